"""What this device can do at best, measured in the same run: copying, reading, and multiplying matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.tools.bench.measure import Timing, spread
from dsv4_jax.tools.bench.workload import Scale, noise


def measure_copy(scale: Scale) -> tuple[Timing, int]:
    """The faster of two ways to copy a large array on the device, and the bytes that it moved, read and written."""
    source = noise((scale.copy_bytes // 4,), jnp.int32)
    return _fastest((_memcpy, _increment), (source,), scale), 2 * source.nbytes


def measure_read(scale: Scale) -> tuple[Timing, int]:
    """The faster of two ways to read a large array on the device, and its bytes."""
    source = noise((scale.copy_bytes // 4,), jnp.int32)
    return _fastest((_largest, _largest_of_rows), (source,), scale), source.nbytes


def measure_matmul(scale: Scale) -> tuple[Timing, int]:
    """A product of two large square matrices in bfloat16, and its operations: a multiplication and an addition each."""
    size = scale.matmul_size
    factors = tuple(noise((size, size), jnp.bfloat16, seed) for seed in range(2))
    return _fastest((jnp.matmul,), factors, scale), 2 * size**3


def _memcpy(x: jax.Array) -> jax.Array:
    return jnp.copy(x)


def _increment(x: jax.Array) -> jax.Array:
    return x + 1


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(x)


def _largest_of_rows(x: jax.Array) -> jax.Array:
    return jnp.max(x.reshape(-1, 4096), axis=1)


def _fastest(ways: Sequence[Callable[..., jax.Array]], operands: tuple[jax.Array, ...], scale: Scale) -> Timing:
    timings = [_time(jax.jit(way).lower(*operands).compile(), operands, scale) for way in ways]
    return min(timings, key=lambda timing: timing.microseconds)


def _time(compiled: Any, operands: tuple[jax.Array, ...], scale: Scale) -> Timing:
    # Long enough that waiting for the last replay does not count.
    replays = 16 if scale.trial_seconds else 2
    times = []
    for trial in range(scale.trials + 1):
        begin = time.perf_counter()
        jax.block_until_ready([compiled(*operands) for _ in range(replays)])
        if trial:  # the first warms up
            times.append((time.perf_counter() - begin) / replays * 1e6)
    return Timing(statistics.median(times), spread(times))
