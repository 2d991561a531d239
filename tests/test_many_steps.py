"""Many steps in one dispatch store what single steps store, byte for byte; a stopped request stores nothing more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import assert_in_place, compile_for_h200
from harness import POOLS, Driver, assert_same_bytes, random_tokens, random_weights, update

from dsv4_jax import CacheFormats
from dsv4_jax.layout.formats import HCA_TAILS

STEPS = 12
LENGTHS = (0, 120, 253, 505)
"""Before the steps: a new request, one that closes an HCA window, two that need another block; all cross CSA's."""


def by_scan(cache, plans, weights, brought, ends):
    """All steps in a ``lax.scan``; ``ends`` bool [steps, R] says after which step a request's text ends."""

    def step(carry, xs):
        cache, stopped, steps_run = carry
        plan, brought, ends = xs
        cache = update(cache, plan.stop(stopped), weights, brought)
        return (cache, stopped | ends, steps_run + ~stopped), None

    carry = (cache, jnp.zeros_like(ends[0]), jnp.zeros(ends.shape[1], jnp.int32))
    (cache, _, steps_run), _ = jax.lax.scan(step, carry, (plans, brought, ends))
    return cache, steps_run


def by_while(cache, plans, weights, brought, ends):
    """The same in a ``lax.while_loop``, which is over when all requests are."""
    steps, real = ends.shape[0], plans.step(0).request_slot >= 0

    def step(state):
        index, cache, stopped, steps_run = state
        now = jax.tree.map(lambda array: array[index], brought)
        cache = update(cache, plans.step(index).stop(stopped), weights, now)
        return index + 1, cache, stopped | ends[index], steps_run + ~stopped

    def goes_on(state):
        index, _, stopped, _ = state
        return (index < steps) & (real & ~stopped).any()

    state = (0, cache, jnp.zeros_like(ends[0]), jnp.zeros(ends.shape[1], jnp.int32))
    _, cache, _, steps_run = jax.lax.while_loop(goes_on, step, state)
    return cache, steps_run


LOOPS = pytest.mark.parametrize("loop", [by_scan, by_while])


class Twins:
    """Two drivers of the same sequences, up to the same lengths: one goes on by single steps, one by a loop."""

    def __init__(self, rng: np.random.Generator, lengths=LENGTHS, formats=None, **settings):
        weights = random_weights(rng)
        sequences = [random_tokens(rng, length + 3 * STEPS) for length in lengths]
        self.drivers = [
            Driver(
                weights, formats or CacheFormats(), slots=len(lengths) + 1, buckets=(len(lengths) + 1, 1024), **settings
            )
            for _ in range(2)
        ]
        self.single, self.loop = self.drivers
        for driver in self.drivers:
            requests = [driver.admit(sequence) for sequence in sequences]
            driver.feed({request: length for request, length in zip(requests, lengths, strict=True) if length})
        self.requests = requests

    def run_loop(self, loop, last_step):
        """STEPS steps of one token by `loop`, in which request i stops after step `last_step[i]`: (plan, steps run)."""
        driver = self.loop
        plan, brought = driver.prepare(dict.fromkeys(self.requests, 1), STEPS)
        ends = np.zeros((STEPS, plan.layout.requests), bool)
        for row, last in enumerate(last_step):
            ends[last : last + 1, row] = True
        run = jax.jit(loop, donate_argnums=0)
        driver.cache, steps_run = run(driver.cache, plan, driver.weights, brought, ends)
        return plan, np.asarray(steps_run)

    def assert_same(self, what):
        for request in self.requests:
            assert_same_bytes(self.single.stored(request), self.loop.stored(request), f"{what}, request {request}")


@LOOPS
def test_a_loop_over_steps_is_the_steps(device, rng, loop):
    twins = Twins(rng)
    for _ in range(STEPS):
        twins.single.feed(dict.fromkeys(twins.requests, 1))
    _, steps_run = twins.run_loop(loop, [STEPS] * len(LENGTHS))
    assert steps_run[: len(LENGTHS)].tolist() == [STEPS] * len(LENGTHS)
    caches = [{name: np.asarray(d.cache.arrays[name]) for name in (*POOLS, "block_table")} for d in twins.drivers]
    assert_same_bytes(*caches, "the whole cache")


@LOOPS
@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_a_stopped_request_stores_nothing_more(device, rng, loop, hca_tail):
    twins = Twins(
        rng, formats=CacheFormats(hca_tail=hca_tail), blocks=11
    )  # what the requests need in the end: none may get lost
    last_step = rng.integers(0, STEPS + 1, len(LENGTHS))
    print("the last step of each request:", last_step)
    for step in range(STEPS):
        going = [r for r, last in zip(twins.requests, last_step, strict=True) if step <= last]
        if going:
            twins.single.feed(dict.fromkeys(going, 1))
    plan, steps_run = twins.run_loop(loop, last_step)
    expected = np.minimum(last_step + 1, STEPS)
    assert steps_run[: len(LENGTHS)].tolist() == expected.tolist()

    manager = twins.loop.manager
    manager.commit(plan, steps_run)
    for request, length, ran in zip(twins.requests, LENGTHS, expected.tolist(), strict=True):
        assert manager.length(request) == length + ran
        row = np.asarray(twins.loop.cache.block_table)[manager.slot(request)]
        blocks = manager.blocks(request)
        np.testing.assert_array_equal(row, np.pad(blocks, (0, row.size - blocks.size), constant_values=-1))
    assert manager.free_blocks == twins.single.manager.free_blocks
    twins.assert_same("after the stop")

    # Each goes on where it stopped, with blocks that another one may have had reserved.
    for request in rng.permutation(twins.requests).tolist():
        for driver in twins.drivers:
            driver.feed({request: 2 * STEPS})
    twins.assert_same("gone on")


def test_a_request_that_stops_before_its_first_step_is_still_to_be_reset(device, rng):
    """Steps of several tokens, and a slot that still holds its former owner's rows when the reset is stopped."""
    twins = Twins(rng, lengths=(3, 126))
    former, other = twins.requests
    sequence = random_tokens(rng, 20)
    for driver in twins.drivers:
        driver.release(former)
        new = driver.admit(sequence)
        slot = driver.manager.slot(new)
    twins.requests = [new, other]
    driver = twins.loop
    before = {name: np.asarray(driver.cache.arrays[name]) for name in POOLS}
    plan, brought = driver.prepare({new: 3, other: 5}, 4)
    step = jax.jit(update, donate_argnums=0)
    for index in range(4):
        masked = plan.step(index).stop(np.arange(plan.layout.requests) == 0)
        now = jax.tree.map(lambda array, index=index: array[index], brought)
        driver.cache = step(driver.cache, masked, driver.weights, now)
    for name in ("window", "window_positions", "csa_tail", "csa_key_tail", "hca_tail"):
        of_slot = [np.asarray(pool)[:, slot] for pool in (before[name], driver.cache.arrays[name])]
        assert of_slot[0].tobytes() == of_slot[1].tobytes(), name
    driver.manager.commit(plan, [0, 4])
    twins.single.feed({other: 20})
    for driver in twins.drivers:
        assert driver.feed({new: 2}).request_reset[0] == 1
    twins.assert_same("after the reset")


@LOOPS
@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_a_loop_over_steps_is_in_place(rng, tmp_path, loop, target):
    driver = Driver(random_weights(rng), CacheFormats(), slots=128, blocks=1 << 12, buckets=(8,))
    requests = [driver.admit(random_tokens(rng, STEPS)) for _ in range(3)]
    plan, brought = driver.prepare(dict.fromkeys(requests, 1), STEPS)
    given = (driver.cache, plan, driver.weights, brought, np.zeros((STEPS, plan.layout.requests), bool))
    if target == "cpu":
        with jax.default_device(jax.devices("cpu")[0]):
            compiled = jax.jit(loop, donate_argnums=0).lower(*given).compile()
    else:
        compiled = compile_for_h200(loop, *given, dump=tmp_path, donate_argnums=0).compiled
    assert_in_place(compiled, driver.cache, temporary_bytes=1 << 20)
