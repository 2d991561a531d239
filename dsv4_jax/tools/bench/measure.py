"""Time of one call: the difference of two programs, one of which makes twice as many calls as the other.

The calls of a program are unrolled and each needs the arrays of the one before, so that XLA captures them in a CUDA
graph, in order. Programs are compiled ahead, own their arrays, and are replayed back to back; the host waits once, at
the end. Whatever a program does besides (evicting the L2 cache, the launch of its graph) cancels in the difference.

It cancels only if the device, not the host, sets the pace of both programs: a short program that waits for its host
takes as long as the host, and the difference comes out too small. So programs evict the cache as often as it takes
until the host's part of the shorter one is small, and where no number suffices there is no figure.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.tools.bench.targets import Target
from dsv4_jax.tools.bench.workload import Scale, Workload, noise

MOST_REPLAYS = 24
"""Programs in flight at the same time; the runtime makes the host wait at about 32."""

MOST_HOST_SHARE = 0.4
"""The host's part of the shorter program up to which the device alone decides how long both programs take."""

EVICTIONS = (1, 2, 4, 8, 16)
"""How often programs rewrite the scratch array, tried in this order until the host's part is small."""


class NoFigureError(RuntimeError):
    """What was measured says nothing about the device: the host was too slow, or the result cannot be."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one call takes.

    Attributes:
      microseconds: median over the trials.
      spread: half the distance of the trials' quartiles, microseconds.
      host_share: the host's part of a program's time, the larger of the two: near 1, the host was the slower of host
        and device, and the figure is not the device's.
      calls: calls in the shorter program.
      evictions: how often each program rewrote the scratch array.
      compile_seconds: of all programs, tracing included.
    """

    microseconds: float
    spread: float
    host_share: float = 0.0
    calls: int = 1
    evictions: int = 1
    compile_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a case that measures by itself found, remarks on it, and its bytes and operations where they are counted.

    ``bytes_moved``, ``operations`` and ``reads`` are as in ``Workload``. ``target`` is what else was measured has it
    held to, if the case has none.
    """

    timing: Timing
    remarks: dict[str, Any] = dataclasses.field(default_factory=dict)
    bytes_moved: int | None = None
    operations: int = 0
    reads: bool = False
    target: Target | None = None


def make_scratch(scale: Scale) -> jax.Array:
    """The array that is rewritten to evict the L2 cache; its elements stay above 0."""
    return noise((scale.scratch_bytes // 4,), jnp.int32) + 1


def program(workload: Workload, calls: int, evictions: int = 1) -> Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]:
    """The function (scratch, state, gates, operands) -> (scratch, state, scalar) that makes that many calls.

    Args:
      workload: what is called.
      calls: how often.
      evictions: how often the scratch array is rewritten before, if the workload has gates.
    """
    one = jax.jit(workload.call)

    def run(scratch: Any, state: Any, gates: Any, operands: Any) -> tuple[Any, Any, Any]:
        sets = len(operands)
        if gates is not None:
            for _ in range(evictions):
                # The barrier: else the compiler would add up the ones.
                scratch = jax.lax.optimization_barrier(scratch + 1)
            zero = jnp.minimum(scratch[0], 0)  # which the compiler cannot know
            gates = [jax.tree.map(lambda x: x + zero, gate) for gate in gates]
        kept = []
        for index in range(calls):
            chosen, layer = index % sets, np.int32(index // sets % workload.layers)
            gate = None if gates is None else gates[chosen]
            state, result = one(state, gate, operands[chosen], layer)
            if result is not None:
                # The barrier: else jnp definitions would compute just the one element.
                result = jax.lax.optimization_barrier(result)
                kept.append(result.reshape(-1)[0].astype(jnp.float32))
        return scratch, state, sum(kept) if kept else None

    return run


def native_calls(compiled: jax.stages.Compiled) -> int:
    """How many native ops a compiled program calls."""
    return len(re.findall(r'custom_call_target="dsv4_', compiled.as_text() or ""))


Replay = Callable[[int, int], tuple[float, float]]
"""Replays program 0 (the shorter) or 1 so many times: seconds of one replay, and the host's part of them."""


def measure(workload: Workload, state: Any, scratch: jax.Array, scale: Scale) -> tuple[Timing, Any, jax.Array]:
    """Times one call of a workload.

    Args:
      workload: the op.
      state: what ``workload.state`` made; donated.
      scratch: from ``make_scratch``; donated.
      scale: how long to measure.

    Returns:
      The timing, and state and scratch to go on with.

    Raises:
      NoFigureError: the host was slower than the device, however long the programs were.
      RuntimeError: the compiler removed or merged native calls, so that there is nothing to measure.
    """

    def build(evictions: int) -> tuple[Replay, float]:
        start = time.perf_counter()
        compiled = _compile(workload, evictions, scratch, state)
        seconds = time.perf_counter() - start

        def replay(which: int, times: int) -> tuple[float, float]:
            nonlocal scratch, state
            begin = time.perf_counter()
            result = None
            for _ in range(times):
                scratch, state, result = compiled[which](scratch, state, workload.gates, workload.operands)
            dispatched = time.perf_counter()
            jax.block_until_ready((scratch, state, result))
            return (time.perf_counter() - begin) / times, (dispatched - begin) / times

        return replay, seconds

    # A workload that evicts nothing has nothing to lengthen its programs with.
    timing = lengthened(build, workload.calls, scale, EVICTIONS if workload.gates is not None else EVICTIONS[:1])
    return timing, state, scratch


def _compile(workload: Workload, evictions: int, scratch: jax.Array, state: Any) -> list[jax.stages.Compiled]:
    lowered = [
        jax.jit(program(workload, calls, evictions), donate_argnums=(0, 1)).lower(
            scratch, state, workload.gates, workload.operands
        )
        for calls in (workload.calls, 2 * workload.calls)
    ]
    with concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
        compiled = list(pool.map(jax.stages.Lowered.compile, lowered))
    short_calls, long_calls = map(native_calls, compiled)
    if long_calls != 2 * short_calls or (short_calls and short_calls % workload.calls):
        raise RuntimeError(f"programs of {workload.calls} and twice as many calls make {short_calls} and {long_calls}")
    return compiled


def lengthened(
    build: Callable[[int], tuple[Replay, float]], calls: int, scale: Scale, evictions: Sequence[int] = EVICTIONS
) -> Timing:
    """Times one call with programs that are long enough for the host not to matter.

    Args:
      build: makes the two programs that evict so often: their replay, and the seconds that compiling them took.
      calls: in the shorter program.
      scale: how long to measure.
      evictions: what to try, in order.

    Raises:
      NoFigureError: the host's part was too large with every one of them. Not in the tiny scale, whose figures mean
        nothing.
    """
    compile_seconds = host_share = 0.0
    for count in evictions:
        replay, seconds = build(count)
        compile_seconds += seconds
        timing = difference(replay, calls, scale)
        host_share = timing.host_share
        if host_share <= MOST_HOST_SHARE or scale.name != "full":
            return dataclasses.replace(timing, evictions=count, compile_seconds=compile_seconds)
    raise NoFigureError(
        f"host-bound: the host took {host_share:.0%} of the shorter program's time, "
        f"and at most {MOST_HOST_SHARE:.0%} can be told from the device's"
    )


def difference(replay: Replay, calls: int, scale: Scale) -> Timing:
    """One call's time out of two programs', as the median of several trials."""
    for which in (0, 1):
        replay(which, 2)
    estimate, _ = replay(0, 3)
    replays = int(np.clip(scale.trial_seconds / estimate, 2, MOST_REPLAYS))
    differences, shares = [], []
    for _ in range(scale.trials):
        short, host = replay(0, replays)
        long, host_of_long = replay(1, replays)
        differences.append((long - short) / calls * 1e6)
        shares.append(max(host / short, host_of_long / long))
    return Timing(statistics.median(differences), spread(differences), statistics.median(shares), calls)


def doubtful(timing: Timing, fewest_microseconds: Mapping[str, float], floor: Timing | None) -> str | None:
    """Why a time cannot be, or None.

    Args:
      timing: of one call on the device.
      fewest_microseconds: by what else the device would do with the bytes or operations of the call, such as "a device
        copy of the same bytes": how long that takes.
      floor: the smallest call, if it was measured.

    Returns:
      One sentence if the call was faster than any of these; than the floor, by more than both spreads.
    """
    if timing.microseconds <= 0:
        return f"no figure: twice the calls took {timing.microseconds:.2f} µs a call more"
    for other, fewest in fewest_microseconds.items():
        if timing.microseconds < fewest:
            return f"no figure: {timing.microseconds:.2f} µs would be faster than {other}, which takes {fewest:.2f}"
    if floor is not None and timing.microseconds + timing.spread < floor.microseconds - floor.spread:
        return (
            f"no figure: {timing.microseconds:.2f} µs would be faster than the smallest call, "
            f"which takes {floor.microseconds:.2f}"
        )
    return None


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 2
