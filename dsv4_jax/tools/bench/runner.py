"""Runs cases one after the other, and keeps what was found."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsv4_jax.spec.presets import deepseek_v4_pro
from dsv4_jax.tools.bench.cases import Case
from dsv4_jax.tools.bench.measure import NoFigureError, Timing, doubtful, make_scratch, measure
from dsv4_jax.tools.bench.roofs import measure_copy, measure_matmul, measure_read
from dsv4_jax.tools.bench.step import floor
from dsv4_jax.tools.bench.targets import Target
from dsv4_jax.tools.bench.workload import Scale, Workload

REFERENCE_CALLS = 1
COUNTED = ("bytes_moved", "operations", "reads")


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found for one case.

    Attributes:
      name: the case's.
      timing: None if it failed.
      bytes_moved: the fewest bytes of one call; None where they are not counted.
      operations: the fewest operations of its matrix products, see ``Workload``.
      reads: whether its bytes are read for the most part.
      target: what the case is held to, if anything.
      reference: the same on the plain jnp definition under jit, if asked for.
      remarks: whatever else is known, such as the number of CUDA graphs.
      error: why it failed, or None.
    """

    name: str
    timing: Timing | None = None
    bytes_moved: int | None = None
    operations: int = 0
    reads: bool = False
    target: Target | None = None
    reference: Timing | None = None
    remarks: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def bytes_per_second(self) -> float | None:
        """What the counted bytes make of the time; None where nothing was counted or the time is too short to tell."""
        if self.timing is None or not self.bytes_moved or self.timing.microseconds <= 0:
            return None
        return self.bytes_moved / self.timing.microseconds * 1e6

    @property
    def operations_per_second(self) -> float | None:
        """What the counted operations make of the time; None as above."""
        if self.timing is None or not self.operations or self.timing.microseconds <= 0:
            return None
        return self.operations / self.timing.microseconds * 1e6


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What results are compared with: a device copy, a device read, a matrix product, and the smallest call."""

    copy: Result
    read: Result
    matmul: Result
    floor: Result


@dataclasses.dataclass(frozen=True)
class Run:
    """All results, and what they are compared with."""

    roofs: Roofs
    results: list[Result]
    scale: Scale


class _States:
    """The arrays of the workload that ran last, and the scratch array."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._key: Any = None
        self._state: Any = None
        self._scratch = make_scratch(scale)

    def time(self, workload: Workload) -> Timing:
        if self._key != workload.key:
            self.drop()
            self._state = jax.block_until_ready(workload.state())
            self._key = workload.key
        try:
            timing, self._state, self._scratch = measure(workload, self._state, self._scratch, self._scale)
        except Exception:
            # What was donated to a failed call is gone.
            self.drop()
            self._scratch = make_scratch(self._scale)
            raise
        return timing

    def drop(self) -> None:
        self._key = self._state = None
        if self._scale.name == "full":
            gc.collect()  # frees large arrays before the next ones are made


def run_cases(
    cases: Sequence[Case],
    scale: Scale,
    *,
    reference: bool = False,
    progress: Callable[[str], None] | None = None,
    found: Callable[[Result], None] | None = None,
) -> Run:
    """Measures what results are compared with, then every case in order.

    A case that fails is a result with an error, and so is one that was faster than it can be, see ``believed``; the
    others still run.

    Args:
      cases: from ``all_cases``.
      scale: the same.
      reference: measure the jnp definition too, where a case has one.
      progress: called with each case's name before it starts.
      found: called with its result afterwards.
    """
    copy, read, matmul = measure_copy(scale), measure_read(scale), measure_matmul(scale)
    states = _States(scale)
    smallest = _tried(Case("floor", floor, has_reference=False), scale, states, reference)
    roofs = Roofs(
        Result("copy", copy[0], copy[1]),
        Result("read", read[0], read[1], reads=True),
        Result("matmul", matmul[0], operations=matmul[1]),
        smallest,
    )
    results = []
    for case in cases:
        if progress:
            progress(case.name)
        result = smallest if case.name == smallest.name else _tried(case, scale, states, reference)
        results.append(believed(result, roofs, scale))
        if found:
            found(results[-1])
    return Run(roofs, _with_sums(results), scale)


def _tried(case: Case, scale: Scale, states: _States, reference: bool) -> Result:
    try:
        return _run(case, scale, states, reference)
    except Exception as error:  # one broken case must not cost the others
        text = str(error) if isinstance(error, NoFigureError) else f"{type(error).__name__}: {error}"
        return Result(case.name, target=case.target, error=text.strip().splitlines()[0][:300])


def believed(result: Result, roofs: Roofs, scale: Scale) -> Result:
    """The result, or in its place an error if it is faster than anything can be; in the tiny scale anything can."""
    if result.timing is None or scale.name != "full" or result.name.startswith("host/"):
        return result
    fewest, memory = {}, roofs.read if result.reads else roofs.copy
    if memory.bytes_per_second is not None:
        seconds = (result.bytes_moved or 0) / memory.bytes_per_second
        fewest[f"a device {memory.name} of the same bytes"] = seconds * 1e6
    if roofs.matmul.operations_per_second is not None:
        seconds = result.operations / roofs.matmul.operations_per_second
        fewest["a matrix product of as many operations"] = seconds * 1e6
    reason = doubtful(result.timing, fewest, roofs.floor.timing)
    return result if reason is None else dataclasses.replace(result, timing=None, error=reason)


def _run(case: Case, scale: Scale, states: _States, reference: bool) -> Result:
    timings: dict[str, Timing] = {}
    counted: dict[str, Any] = {}
    remarks: dict[str, Any] = {}
    target = case.target if scale.name == "full" else None
    for implementation in ("native", "reference") if reference and case.has_reference else ("native",):
        if case.run is not None:
            states.drop()
            outcome = case.run(scale, implementation)
            timings[implementation], remarks = outcome.timing, remarks or outcome.remarks
            target = target or (outcome.target if scale.name == "full" else None)
            counted = {name: getattr(outcome, name) for name in COUNTED}
        elif case.build is not None:
            workload = case.build(scale, implementation)
            if implementation == "reference":
                workload = dataclasses.replace(workload, calls=REFERENCE_CALLS)
            timings[implementation] = states.time(workload)
            counted = {name: getattr(workload, name) for name in COUNTED}
    made = Result(case.name, timings["native"], target=target, reference=timings.get("reference"), remarks=remarks)
    return dataclasses.replace(made, **counted)


def _with_sums(results: list[Result]) -> list[Result]:
    """Holds the whole step to the sum of its layers' updates, where those were measured in the same run."""
    times = {result.name: result.timing.microseconds for result in results if result.timing}
    pro = deepseek_v4_pro()
    summed = []
    for result in results:
        batch = result.name.removeprefix("step/pro/")
        parts = {kind: f"update/{kind.value}/mixed/{batch}" for kind in dict.fromkeys(pro.layer_kinds)}
        if result.remarks.get("layers") == len(pro.layers) and all(name in times for name in parts.values()):
            total = sum(pro.count(kind) * times[name] for kind, name in parts.items())
            result = dataclasses.replace(
                result, target=Target(1.15 * total, 1.05 * total), remarks=result.remarks | {"sum_of_updates": total}
            )
        summed.append(result)
    return summed
