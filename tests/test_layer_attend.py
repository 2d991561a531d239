"""layer.attend: what it sees is what the gathers read, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attended import softmax_attention
from harness import SPEC, Driver, inputs_of, random_tokens, random_weights
from implementations import IMPLEMENTATIONS

from dsv4_jax import CacheFormats, StepError, begin, closing_rotary, token_rotary
from dsv4_jax.cache.errors import WrongLayerKind

EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
SWA, CSA, HCA = range(3)
HEADS, CHOSEN = 8, 6


class Given:
    """A step that brings `tokens` of requests behind these lengths: cache, plan, weights, what the tokens bring."""

    def __init__(self, rng, lengths, tokens=1, buckets=(2, 16, 512), **settings):
        self.driver = Driver(random_weights(rng), CacheFormats(), buckets=buckets, **settings)
        requests = [self.driver.admit(random_tokens(rng, 300)) for _ in lengths]
        self.driver.feed(dict(zip(requests, lengths, strict=True)))
        self.plan, self.brought = self.driver.prepare(dict.fromkeys(requests, tokens))
        self.queries = jnp.asarray(rng.normal(size=(self.plan.layout.tokens, HEADS, 512)), jnp.float32)
        self.indices = jnp.asarray(rng.integers(-1, 40, size=(self.plan.layout.tokens, CHOSEN)), jnp.int32)

    def written(self, step, layer):
        """The layer of the step, updated; layers before it are not."""
        inputs = [
            inputs_of(step.plan, SPEC, layer, self.driver.weights[layer], self.brought[layer], p)
            for p in ("", "index_")
        ]
        return step.layer(layer).update(self.brought[layer]["rows"], *inputs)

    def chosen(self, layer):
        return {"indices": self.indices} if layer == CSA else {}

    def trace(self, program):
        """Traces program(step)."""
        return jax.eval_shape(lambda cache: program(begin(cache, self.plan)), self.driver.cache)


def displaces_nothing(plan):
    """The plan with a layout that says so, whatever it does."""
    return dataclasses.replace(plan, layout=dataclasses.replace(plan.layout, displaces=False))


def _attend_and_read(cache, plan, given, layer, sinks, implementation):
    handle = given.written(begin(cache, plan, implementation=implementation), layer)
    rotary = token_rotary(plan, SPEC.layers[layer].rope)
    handle, attended = handle.attend(given.queries, sinks, rotary=rotary, dtype=jnp.float32, **given.chosen(layer))
    handle, window = handle.window(dtype=jnp.float32)
    rows = [window]
    if layer == CSA:
        handle, entries = handle.entries(given.indices, dtype=jnp.float32)
        rows.append(entries)
    elif layer == HCA:
        handle, entries = handle.all_entries(4, dtype=jnp.float32)
        rows.append(entries)
    return attended, rows, rotary


@EACH
@pytest.mark.parametrize("layer", [SWA, CSA, HCA])
def test_it_sees_what_the_gathers_read(rng, implementation, layer):
    """A decode step of two requests, one of which closes a CSA entry and the other one an HCA entry."""
    given = Given(rng, (263, 127))
    sinks = jnp.asarray(rng.normal(size=HEADS), jnp.float32)
    run = jax.jit(functools.partial(_attend_and_read, given=given, layer=layer, implementation=implementation))
    attended, read, rotary = run(given.driver.cache, given.plan, sinks=sinks)
    for token in range(2):
        seen = np.concatenate([np.asarray(rows.values[token])[np.asarray(rows.valid[token])] for rows in read])
        output, lse = softmax_attention(given.queries[token], seen.astype(np.float64), sinks, rotary, token)
        np.testing.assert_allclose(attended.output[token], output, rtol=0, atol=1e-5)
        np.testing.assert_allclose(attended.lse[token], lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [SWA, CSA, HCA])
def test_drafts_see_what_single_tokens_see(seed, layer):
    """Four tokens of each request in one step, with lookahead for them: as one after another."""

    def attend(given):
        def run(cache, plan):
            handle = given.written(begin(cache, plan), layer)
            return handle.attend(given.queries, dtype=jnp.float32, **given.chosen(layer))[1]

        return jax.jit(run)(given.driver.cache, given.plan)

    lengths = (261, 124)
    together = Given(np.random.default_rng(seed), lengths, tokens=4, lookahead=3)
    expected = attend(together)
    for number in range(4):
        behind = [length + number for length in lengths]
        alone = Given(np.random.default_rng(seed), behind, lookahead=3)
        places = number + 4 * np.arange(2)
        alone.queries, alone.indices = together.queries[places], together.indices[places]
        attended = attend(alone)
        np.testing.assert_allclose(attended.output, expected.output[places], rtol=0, atol=1e-5)
        np.testing.assert_allclose(attended.lse, expected.lse[places], rtol=0, atol=1e-5)


@EACH
@pytest.mark.parametrize("layer", [SWA, CSA, HCA])
def test_long_chunks_see_what_the_gathers_read(rng, implementation, layer):
    """Chunks that overwrite ring rows which their early tokens see, and rows of their own."""
    given = Given(rng, (131, 20), tokens=140, buckets=(280,))

    def run(cache, plan):
        step = begin(cache, plan, implementation=implementation)
        before = step.layer(layer).window_before(dtype=jnp.float32)[1]
        handle = given.written(step, layer)
        own = handle.stored(given.brought[layer]["rows"], dtype=jnp.float32)
        attended = handle.attend(given.queries, dtype=jnp.float32, **given.chosen(layer))[1]
        if layer == CSA:
            return attended, before, own, handle.entries(given.indices, dtype=jnp.float32)[1]
        return attended, before, own, handle.all_entries(2, dtype=jnp.float32)[1] if layer == HCA else None

    attended, before, own, entries = jax.jit(run)(given.driver.cache, given.plan)
    visible = (given.plan.token_position + 1) // 128
    for token in (0, 1, 12, 100, 138, 139, 140, 141, 180, 279):
        request = token // 140
        earlier = np.asarray(before.values[request])[np.asarray(before.valid[request])]
        rows = np.concatenate([earlier, own[140 * request : token + 1]])[-128:]
        if layer == CSA:
            rows = np.concatenate([rows, np.asarray(entries.values[token])[np.asarray(entries.valid[token])]])
        elif layer == HCA:
            rows = np.concatenate([rows, entries.values[request, : visible[token]]])
        output, lse = softmax_attention(given.queries[token], rows.astype(np.float64), None, None, token)
        np.testing.assert_allclose(attended.output[token], output, rtol=0, atol=1e-5)
        np.testing.assert_allclose(attended.lse[token], lse, rtol=0, atol=1e-5)


@EACH
@pytest.mark.parametrize("layer", [SWA, CSA, HCA])
def test_a_token_that_lacks_rows_is_nan(rng, implementation, layer):
    """Without lookahead, the first two of three tokens see rows that later ones overwrite; in a ring not full, none."""
    given = Given(rng, (260, 20), tokens=3)
    given.plan = displaces_nothing(given.plan)
    sinks = jnp.asarray(rng.normal(size=HEADS), jnp.float32)
    run = jax.jit(functools.partial(_attend_and_read, given=given, layer=layer, implementation=implementation))
    attended, _, _ = run(given.driver.cache, given.plan, sinks=sinks)
    lacking = np.isin(np.arange(given.plan.layout.tokens), [0, 1])
    for found in (attended.output, attended.lse):
        of_token = np.asarray(found).reshape(len(lacking), -1)
        assert np.isnan(of_token[lacking]).all()
        assert np.isfinite(of_token[:6][~lacking[:6]]).all()


@pytest.mark.parametrize("layer", [SWA, CSA, HCA])
def test_what_is_not_the_kinds_is_refused(rng, layer):
    given = Given(rng, (40, 50))
    wrong = {
        SWA: ({"indices": given.indices}, {"entries": 4}),
        CSA: ({}, {"indices": given.indices, "entries": 4}),
        HCA: ({"indices": given.indices},),
    }
    for arguments in wrong[layer]:
        with pytest.raises(WrongLayerKind, match=rf"layer {layer} \((SWA|CSA|HCA)\): attend (takes|needs)"):
            given.trace(lambda step, a=arguments: given.written(step, layer).attend(given.queries, **a)[1])


def test_before_the_update_is_refused(rng):
    given = Given(rng, (40, 50))
    with pytest.raises(StepError, match=r"attend before append \(or update\)"):
        given.trace(lambda step: step.layer(SWA).attend(given.queries)[1])

    def appended(step):
        inputs = inputs_of(step.plan, SPEC, HCA, given.driver.weights[HCA], given.brought[HCA])
        return step.layer(HCA).append(given.brought[HCA]["rows"], inputs)

    with pytest.raises(StepError, match="attend before flush"):
        given.trace(lambda step: appended(step).attend(given.queries)[1])


def test_a_rotary_of_something_else_is_refused(rng):
    given = Given(rng, (40, 50))
    closing = closing_rotary(given.plan, 128, SPEC.layers[HCA].rope)
    other = token_rotary(given.plan, SPEC.layers[SWA].rope)
    for rotary, message in ((closing, "is for closing entries"), (other, "was made with")):
        with pytest.raises(StepError, match=f"the rotary of the output {message}"):
            given.trace(lambda step, r=rotary: given.written(step, HCA).attend(given.queries, rotary=r)[1])


def run_debug_step(rng, length, tokens):
    """A debug step of one request whose ring has 131 rows; what the device finds wrong is raised here."""
    given = Given(rng, (length,), tokens=tokens, lookahead=3)
    given.plan = displaces_nothing(given.plan)

    def run(cache):
        return given.written(begin(cache, given.plan, debug=True), SWA).attend(given.queries)[1]

    jax.block_until_ready(jax.jit(run)(given.driver.cache))
    jax.effects_barrier()


@pytest.mark.parametrize(("length", "tokens"), [(115, 16), (200, 4)])
def test_a_debug_step_takes_chunks_that_leave_windows_whole(rng, length, tokens):
    """Of the lookahead and one more token, or of any number as long as nothing has left the ring."""
    run_debug_step(rng, length, tokens)


@pytest.mark.parametrize(("length", "tokens"), [(116, 16), (200, 5)])
def test_a_debug_step_refuses_chunks_that_take_rows_still_seen(rng, length, tokens):
    with pytest.raises(Exception, match=f"request 0 of the plan brings {tokens} tokens, more than a ring of 131 rows"):
        run_debug_step(rng, length, tokens)
