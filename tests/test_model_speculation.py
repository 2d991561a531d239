"""A whole model that verifies drafts in a loop on the device says what it says token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from served import EXACT, model

from dsv4_jax import CacheManager, CacheSchema, init_cache
from dsv4_jax.deepseek_v4.model import logits, run_layers
from dsv4_jax.layout.formats import HCA_TAILS

DRAFTS, STEPS, NEW = 3, 24, 24
PROMPTS = (3, 125, 250)
LENGTH = max(PROMPTS) + NEW + DRAFTS + 2


def speculate(weights, cache, plans, lengths, first, drafts, *, config):
    """Up to STEPS steps: (cache, lengths, what was said [R, LENGTH] at each position, its logits).

    ``first`` [R] is the token that each request goes on with, ``drafts`` [R, LENGTH] has guesses for all positions.
    """
    requests, goal = len(PROMPTS), lengths + NEW
    rows = jnp.arange(requests)[:, None]

    def step(state):
        index, cache, lengths, following, said, scores = state
        plan = plans.step(index).rebase(lengths).stop(lengths >= goal)
        position = lengths[:, None] + jnp.arange(1 + DRAFTS)
        tokens = jnp.where(position == lengths[:, None], following[:, None], drafts[rows, position])
        cache, streams, _ = run_layers(weights, cache, plan, tokens.reshape(-1), config=config, dtype=jnp.float32)
        likely = logits(weights, config, streams).reshape(requests, 1 + DRAFTS, -1)
        answer = likely.argmax(-1).astype(jnp.int32)
        right = jnp.cumprod(tokens[:, 1:] == answer[:, :-1], axis=1).sum(axis=1)
        counts = (jnp.arange(1 + DRAFTS) <= right[:, None]) & (lengths < goal)[:, None]
        at = jnp.where(counts, position, LENGTH)
        said, scores = said.at[rows, at].set(answer, mode="drop"), scores.at[rows, at].set(likely, mode="drop")
        going = lengths < goal
        following = jnp.where(going, answer[jnp.arange(requests), right], following)
        return index + 1, cache, jnp.where(going, lengths + 1 + right, lengths), following, said, scores

    said = jnp.zeros((requests, LENGTH), jnp.int32)
    scores = jnp.zeros((requests, LENGTH, weights.head.shape[0]))
    state = (0, cache, lengths, first, said, scores)
    state = jax.lax.while_loop(lambda state: (state[0] < STEPS) & (state[2] < goal).any(), step, state)
    return state[1], state[2], state[4], state[5]


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_a_model_with_drafts_says_what_it_says_without(device, rng, seed, hca_tail):
    config, weights = model(seed)
    weights = jax.device_put(weights)
    prompts = [rng.integers(0, 250, length) for length in PROMPTS]

    def prepare(lookahead, bucket):
        formats = dataclasses.replace(EXACT, hca_tail=hca_tail)
        schema = CacheSchema(config.spec, formats, len(PROMPTS), 12, 512, lookahead)
        manager, cache = CacheManager(schema, token_buckets=[bucket, 512]), init_cache(schema)
        requests = [manager.admit() for _ in PROMPTS]
        plan = manager.prepare_forward(dict(zip(requests, PROMPTS, strict=True)))
        return manager, requests, *run(weights, cache, plan, plan.pack_tokens(prompts))

    @functools.partial(jax.jit, donate_argnums=1)
    def run(weights, cache, plan, tokens):
        cache, streams, _ = run_layers(weights, cache, plan, tokens, config=config, dtype=jnp.float32)
        return cache, logits(weights, config, streams[plan.last_token])

    manager, requests, cache, scores = prepare(0, len(PROMPTS))
    first = jnp.argmax(scores, -1).astype(jnp.int32)
    following, text, expected = first, np.zeros((len(PROMPTS), LENGTH), np.int32), {}
    for step in range(NEW + DRAFTS + 1):
        plan = manager.prepare_forward(dict.fromkeys(requests, 1))
        cache, scores = run(weights, cache, plan, following)
        for row, length in enumerate(PROMPTS):
            text[row, length + step] = following[row]
            expected[row, length + step] = np.asarray(scores)[row]
        following = jnp.argmax(scores, -1).astype(jnp.int32)

    drafts = np.where(rng.random(text.shape) < 0.3, rng.integers(0, 250, text.shape), text).astype(np.int32)
    manager, requests, cache, scores = prepare(DRAFTS, len(PROMPTS) * (1 + DRAFTS))
    np.testing.assert_array_equal(jnp.argmax(scores, -1), first)
    plans = manager.prepare_forward(dict.fromkeys(requests, 1 + DRAFTS), drafts=DRAFTS, steps=STEPS)
    loop = jax.jit(functools.partial(speculate, config=config), donate_argnums=1)
    lengths = jnp.array(PROMPTS, jnp.int32)
    cache, lengths, said, scores = loop(weights, cache, plans, lengths, first, drafts)
    manager.commit(plans, lengths=lengths)
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths.tolist(), strict=True)):
        assert manager.length(requests[row]) == length
        assert length >= prompt + NEW
        for position in range(prompt, length):
            np.testing.assert_allclose(scores[row, position], expected[row, position], rtol=0, atol=1e-4)
            if position + 1 < prompt + NEW:
                assert said[row, position] == text[row, position + 1]
