"""Prompt look-up: what followed the latest tokens before, against a search that is written down as it is said."""

import numpy as np
import pytest

from dsv4_jax.deepseek_v4.drafters import PromptLookup
from dsv4_jax.deepseek_v4.speculation import Speculation


def looked_up(tokens: list[int], most: int, longest: int, shortest: int) -> list[int]:
    """The longest ending that was there before, the latest of its places; what stands behind that, over and over."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return (tokens[end:] * most)[:most]
    return []


@pytest.mark.parametrize("letters", [1, 2, 5, 60])
def test_guesses_what_followed_before(letters, rng):
    guessed = 0
    for _ in range(100):
        tokens = rng.integers(0, letters, rng.integers(1, 60)).astype(np.int32)
        most, shortest = int(rng.integers(1, 6)), int(rng.integers(1, 4))
        longest = shortest + int(rng.integers(0, 4))
        found = PromptLookup(longest, shortest).draft(tokens, most)
        assert found.dtype == np.int32
        assert found.tolist() == looked_up(tokens.tolist(), most, longest, shortest)
        guessed += found.size > 0
    assert guessed > 0


@pytest.mark.parametrize(("longest", "shortest"), [(0, 0), (3, 0), (2, 3)])
def test_lengths_out_of_range_are_refused(longest, shortest):
    with pytest.raises(ValueError, match="shortest <= longest"):
        PromptLookup(longest, shortest)


class Heard:
    """A drafter that keeps what it is asked, and gives what it was told to."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def draft(self, tokens, most):
        self.asked.append((tokens.tolist(), most))
        return self.answer


def test_a_drafter_is_asked_about_the_text_as_it_grows():
    heard = Heard([5, 6])
    speculation = Speculation(heard, 3)
    assert speculation.drafts(7, [1, 2], 9).tolist() == [5, 6]
    speculation.drafts(8, [3], 9)
    speculation.drafts(7, [1, 2, 5, 4], 9)
    speculation.drafts(7, [1, 2, 5, 4, 4, 4, 4], 9)
    assert heard.asked == [([1, 2], 3), ([3], 3), ([1, 2, 5, 4], 3), ([1, 2, 5, 4, 4, 4, 4], 2)]
    assert speculation.drafts(7, [1, 2, 5, 4, 4, 4, 4, 4, 4], 9).size == 0  # the text ends here
    speculation.forget(7)
    speculation.drafts(7, [9], 4)
    assert heard.asked[-1] == ([9], 3)


@pytest.mark.parametrize("answer", [[1, 2, 3, 4], [[1]], 1])
def test_a_drafter_that_gives_something_else_is_refused(answer):
    with pytest.raises(ValueError, match="a drafter gives"):
        Speculation(Heard(answer), 3).drafts(0, [1], 9)


def test_fewer_drafts_than_none_are_refused():
    with pytest.raises(ValueError, match="0 for none"):
        Speculation(PromptLookup(), -1)
