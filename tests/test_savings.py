"""A server that shares prefixes and verifies drafts says what one says that does neither, and tells what it saved."""

import dataclasses

import numpy as np
import pytest
from served import EXACT, VOCABULARY, cheap_step, check, make_server

from dsv4_jax.deepseek_v4 import serve
from dsv4_jax.deepseek_v4.sampling import Sampling
from dsv4_jax.deepseek_v4.serve import Request

NEW, DRAFTS = 14, 3
SIZES = {"slots": 2, "max_context": 384, "chunk": 96}
OPTIONS = {
    "drafts": {"speculate": DRAFTS},
    "sharing": {"share_prefix": True},
    "both": {"speculate": DRAFTS, "share_prefix": True},
}


def requests(seed: int) -> list[Request]:
    """Five over two slots. Three have their first 150 tokens in common, and the second of these comes twice."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCABULARY, 150)
    prompts = [np.append(common, rng.integers(0, VOCABULARY, size)) for size in (120, 131, 142)]
    prompts += [rng.integers(0, VOCABULARY, 20), prompts[1]]
    return [Request(one.astype(np.int32), NEW, seed=seed + index) for index, one in enumerate(prompts)]


class Prophet:
    """Knows the texts that will come, and is wrong now and then; at times it has less to say."""

    def __init__(self, served, rng):
        self.texts, self.rng, self.asked = [one.tokens for one in served], rng, 0

    def draft(self, tokens, most):
        self.asked += 1
        ahead = {tuple(one[len(tokens) :]) for one in self.texts if one[: len(tokens)] == tokens.tolist()}
        text = sorted(ahead)[0]
        guesses = np.array(text[: int(self.rng.integers(0, most + 1))], np.int32)
        return np.where(self.rng.random(guesses.size) < 0.3, guesses + 1, guesses)


@pytest.fixture
def no_model(seed, monkeypatch):
    """For what is not of the model."""
    monkeypatch.setattr(serve, "step", cheap_step(seed))


def assert_told(server, prophet, found):
    """The counts of what was shared and guessed among the requests above fit what was computed."""
    metrics, drafted, accepted = server.manager.metrics(), server.speculation.drafted, server.speculation.accepted
    if server.speculation.most:
        assert 0 < accepted < drafted
    else:
        assert (drafted, accepted, prophet.asked) == (0, 0, 0)
    if server.prefixes:
        # The first one leaves a snapshot at its end, the second there and where they part; then two can begin later.
        assert (server.prefixes.requests, server.prefixes.hits) == (5, 2)
        assert metrics["prefix_cache_hits"] == 128 + 256
        copied = server.schema.bytes_per_snapshot - server.schema.table_bytes
        assert server.prefixes.bytes_moved == server.prefixes.copies * copied >= (3 + 2) * copied
    computed = sum(one.tokens for one in server.statistics.values())
    assert computed == sum(one.done for one in found) - metrics["prefix_cache_hits"]
    assert set(server.compiles.values()) == {1}
    assert server.manager.free_slots == 2
    assert server.manager.free_blocks == server.schema.blocks


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(1.5, 0.9)], ids=["greedy", "0.5", "1.5"])
def test_texts_are_those_without(sampling, seed, rng, no_model):
    options = {**SIZES, "record": False, "sampling": sampling}
    expected = make_server(EXACT, seed, **options).serve(requests(seed))
    for name, chosen in OPTIONS.items():
        prophet = Prophet(expected, rng)
        server = make_server(EXACT, seed, **options, **chosen, drafter=prophet)
        found = server.serve(requests(seed))
        assert [one.tokens for one in found] == [one.tokens for one in expected], name
        assert [one.done for one in found] == [one.done for one in expected], name
        assert_told(server, prophet, found)


def test_the_model_says_the_same_and_every_kept_token_is_verified(seed, rng):
    sampling = Sampling(0.8)
    expected = make_server(EXACT, seed, **SIZES, record=False, sampling=sampling).serve(requests(seed))
    prophet = Prophet(expected, rng)
    server = make_server(EXACT, seed, **SIZES, sampling=sampling, **OPTIONS["both"], drafter=prophet)
    found = server.serve(requests(seed))
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert_told(server, prophet, found)
    for one in found:
        judged = [np.arange(end - record.judged, end) for record in one.steps for end in [record.first + record.tokens]]
        assert set(range(len(one.request.prompt) - 1, one.done)) <= set(np.concatenate(judged).tolist())
    result = check(server, found)
    assert result.passed
    assert result.positions == sum(record.judged for one in found for record in one.steps)

    # What an earlier call left is not shared with one that is to be verified.
    server.serve(requests(seed)[2:3])
    assert server.prefixes.hits == 2

    # Of the logits of several tokens of a step, every one is compared.
    one, place = next((one, place) for one in found for place, record in enumerate(one.steps) if record.judged > 1)
    record, steps = one.steps[place], [*one.steps]
    logits = np.array(record.logits)
    logits[record.row - 1] += result.scale
    steps[place] = record._replace(logits=logits)
    assert not check(server, [dataclasses.replace(one, steps=steps)]).passed


def test_forced_text_accepts_its_own_tokens(seed, no_model):
    """Whatever the model would have said, and from call to call: nothing recorded, so the second one shares all."""
    text = np.tile(np.random.default_rng(seed).permutation(20), 20).astype(np.int32)
    request = Request(text[:150], NEW, text[150 : 150 + NEW])
    server = make_server(EXACT, seed, **SIZES, record=False, **OPTIONS["both"])
    for hits in (0, 128):
        (one,) = server.serve([request])
        assert one.tokens == text[: 150 + NEW].tolist()
        assert server.manager.metrics()["prefix_cache_hits"] == hits
    # A text that repeats itself is guessed in full: 1 + 3 tokens a step, and 2 in the last.
    assert server.speculation.accepted == server.speculation.drafted == 2 * (3 + 3 + 3 + 1)
    assert server.statistics["decode"].steps == 2 * 4


def test_an_end_token_ends_the_text_among_drafts(seed, rng, no_model, monkeypatch):
    """Guessed or not, it is not fed, and what was guessed behind it is not kept."""
    options = {**SIZES, "record": False, "sampling": Sampling(1.5, 0.9)}
    whole = make_server(EXACT, seed, **options).serve(requests(seed))
    server = make_server(EXACT, seed, **options, **OPTIONS["both"], drafter=Prophet(whole, rng))
    ends = whole[0].tokens[len(whole[0].request.prompt) + 6]
    monkeypatch.setattr(server, "config", dataclasses.replace(server.config, end_tokens=(ends,)))
    for one, other in zip(server.serve(requests(seed)), whole, strict=True):
        first = len(other.request.prompt)
        said = other.tokens[first:]
        kept = said.index(ends) if ends in said else NEW
        assert one.done == one.total == first + kept
        assert one.tokens[: one.done] == other.tokens[: one.done]


def test_requests_of_other_salts_share_nothing(seed, no_model):
    """The requests above, where those that would hit are another tenant's; then all of one tenant that has a salt."""
    for salts, hits in ((b"", b"a", b"b", b"", b"c"), 0), ((b"a",) * 5, 2):
        salted = [dataclasses.replace(one, salt=salt) for one, salt in zip(requests(seed), salts, strict=True)]
        server = make_server(EXACT, seed, **SIZES, share_prefix=True, record=False)
        server.serve(salted)
        assert server.prefixes.hits == hits
        assert bool(server.manager.metrics()["prefix_cache_hits"]) == bool(hits)
