"""Texts, and the requests that read them."""

import numpy as np
import pytest

from dsv4_jax.deepseek_v4.text import load_text, prompt_requests, text_requests


@pytest.mark.parametrize("forced", [True, False])
def test_each_request_reads_on_from_its_own_place(forced, seed):
    """And from the start again after the end."""
    requests = text_requests(range(100), 4, longest_prompt=70, new_tokens=50, seed=seed, forced=forced)
    for index, request in enumerate(requests):
        assert 30 <= len(request.prompt) <= 70
        assert request.new_tokens == 50
        read = [request.prompt] if request.continuation is None else [request.prompt, request.continuation]
        tokens = np.concatenate(read)
        assert len(tokens) == len(request.prompt) + 50 * forced
        np.testing.assert_array_equal(tokens, (25 * index + np.arange(len(tokens))) % 100)
    assert len({request.seed for request in requests}) == 4


def test_requests_that_begin_alike(seed):
    """With the text's first tokens; each goes on from a place of its own, and is as long as otherwise."""
    options = {"longest_prompt": 70, "new_tokens": 50, "seed": seed}
    apart, alike = (text_requests(range(100), 4, **options, alike=alike) for alike in (False, True))
    for index, (one, other) in enumerate(zip(alike, apart, strict=True)):
        assert len(one.prompt) == len(other.prompt)
        tokens = np.append(one.prompt, one.continuation)
        np.testing.assert_array_equal(tokens[:30], range(30))
        np.testing.assert_array_equal(tokens[30:], (30 + 25 * index + np.arange(len(tokens) - 30)) % 100)


def test_a_request_for_each_prompt():
    one, other = prompt_requests([[1, 2, 3], [4]], new_tokens=7, seed=2**32 - 1)
    np.testing.assert_array_equal(one.prompt, [1, 2, 3])
    assert (one.continuation, one.new_tokens, one.seed) == (None, 7, 2**32 - 1)
    assert other.seed == 0  # seeds are 32 bits


def test_the_package_has_a_text():
    assert len(load_text()) > 1000


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b"\xff\xfe\xfa", "UTF-8")])
def test_what_is_no_text_is_refused(tmp_path, content, said):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"file.*{said}"):
        load_text(path)
