"""The server: requests are kept apart, chunks do not matter, and what it says is what the logits say."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from served import EXACT, exact_run, exact_server, make_requests, make_server

from dsv4_jax.deepseek_v4 import serve
from dsv4_jax.deepseek_v4.sampling import Sampling
from dsv4_jax.deepseek_v4.serve import Server


def last_logits(one) -> np.ndarray:
    record = one.steps[-1]
    return np.asarray(record.logits)[record.row]


def test_one_compilation_for_each_layout_that_comes(seed):
    exact_run(seed)
    compiled = {(layout.tokens, layout.displaces): count for layout, count in exact_server(seed).compiles.items()}
    assert compiled.keys() <= {(2, False), (2, True), (96, True)}
    assert compiled.keys() >= {(2, False), (96, True)}
    assert set(compiled.values()) == {1}
    assert set(exact_server(seed).compiles) <= set(exact_server(seed).manager.layouts)


def test_logits_do_not_depend_on_the_chunks(seed):
    """All prompts at once: the last logits are those of the run in ragged chunks."""
    served = make_server(EXACT, seed, chunk=700).serve(make_requests(seed))
    for one, other in zip(served, exact_run(seed), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(last_logits(one), last_logits(other), rtol=0, atol=1e-4)


def test_requests_are_kept_apart(seed):
    """A request served alone, in a slot that others have used, says what it says in company."""
    served = exact_run(seed)
    assert len({one.slot for one in served}) == 2  # so the third request came into a used slot
    (alone,) = exact_server(seed).serve([served[2].request])
    np.testing.assert_allclose(last_logits(alone), last_logits(served[2]), rtol=0, atol=1e-4)


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.ran_tokens, self.said, self.order = 0, {}, []

    def ran(self, phase, tokens):
        self.ran_tokens += tokens

    def chose(self, number, token):
        assert number not in self.order
        self.said.setdefault(number, []).append(token)

    def ended(self, number):
        self.order.append(number)


def test_greedy_tokens_are_the_likeliest(seed):
    heard = Heard()
    served = exact_server(seed).serve(make_requests(seed, forced=False), heard)
    for one in served:
        prompt = len(one.request.prompt)
        logits = {record.first + record.tokens - 1: np.asarray(record.logits)[record.row] for record in one.steps}
        assert len(one.tokens) == one.total == one.done == prompt + 12
        for position in range(prompt, one.total):
            assert one.tokens[position] == logits[position - 1].argmax()
        assert heard.said[one.number] == one.tokens[prompt:]
    assert sorted(heard.order) == [0, 1, 2]
    assert heard.ran_tokens == sum(one.total for one in served)


def test_an_end_token_ends_the_text(seed, monkeypatch):
    """It is not fed, nor told, and the slot is free for the next request."""
    server, requests = exact_server(seed), make_requests(seed, forced=False)
    whole = server.serve(requests)
    prompt = len(requests[0].prompt)
    ends = whole[0].tokens[prompt + 5]
    monkeypatch.setattr(server, "config", dataclasses.replace(server.config, end_tokens=(300, ends)))
    heard = Heard()
    for one, before in zip(server.serve(requests, heard), whole, strict=True):
        first = len(one.request.prompt)
        said = before.tokens[first:]
        kept = said[: said.index(ends)] if ends in said else said
        assert heard.said.get(one.number, []) == kept
        assert one.done == one.total == first + len(kept)
    assert server.manager.free_slots == 2


def test_drawn_text_depends_on_the_seed_and_not_on_the_company(seed):
    server = make_server(EXACT, seed, slots=3, chunk=3, sampling=Sampling(0.9, 0.95))
    first, *_ = make_requests(seed, forced=False)
    requests = [dataclasses.replace(first, prompt=first.prompt[:1], seed=seed + number) for number in (0, 1, 2, 0)]
    texts = [one.tokens[1:] for one in server.serve(requests)]
    (alone,) = server.serve([requests[2]])
    assert alone.tokens[1:] == texts[2]
    assert texts[3] == texts[0]
    assert texts[0] != texts[1] != texts[2]
    assert server.compiles.total() == 1  # one token of each request, always


def test_no_more_than_a_few_steps_are_in_flight(monkeypatch, seed):
    """Every step is waited for before the third one after it is sent."""
    sent, waited, most = [], set(), []

    class Chosen:
        def __init__(self):
            sent.append(self)
            most.append(len(sent) - len(waited))

        def block_until_ready(self):
            waited.add(id(self))

    server = make_server(EXACT, seed, chunk=32, record=False)
    server._step = lambda cache, plan, weights, tokens, seeds: (cache, Chosen(), None, None)
    server.serve(make_requests(seed))
    assert len(sent) > 30
    assert max(most) <= serve.STEPS_IN_FLIGHT + 1


def test_activations_are_bfloat16_unless_it_is_asked_otherwise():
    assert jnp.dtype(Server.__init__.__kwdefaults__["dtype"]) == jnp.bfloat16
