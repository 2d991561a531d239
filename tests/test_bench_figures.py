"""What the benchmark makes of times, with clocks that are made up: nothing is timed here."""

import dataclasses

import pytest

from dsv4_jax.tools.bench import runner
from dsv4_jax.tools.bench.attended_step import PARTS, added
from dsv4_jax.tools.bench.cases import Case
from dsv4_jax.tools.bench.measure import (
    EVICTIONS,
    MOST_HOST_SHARE,
    NoFigureError,
    Outcome,
    Timing,
    difference,
    doubtful,
    lengthened,
)
from dsv4_jax.tools.bench.runner import Result, Roofs, believed
from dsv4_jax.tools.bench.workload import FULL, TINY, Workload

CALLS = 10
MICRO = 1e-6


def machine(*, call, eviction, host):
    """Programs on a made-up machine: microseconds of a call, of an eviction, and of the host to send a program."""
    built = []

    def build(evictions):
        built.append(evictions)

        def replay(which, times):
            device = evictions * eviction + (1 + which) * CALLS * call
            return max(host, device) * MICRO, host * MICRO

        return replay, 0.5

    return build, built


def test_a_difference_is_what_a_call_takes():
    build, built = machine(call=3.0, eviction=500.0, host=50.0)
    timing = lengthened(build, CALLS, FULL)
    assert timing.microseconds == pytest.approx(3.0)
    assert built == [1]
    assert timing.evictions == 1
    assert timing.compile_seconds == 0.5


def test_programs_grow_until_the_host_does_not_matter(rng):
    """A host slower than the short program would halve the figure; longer programs give the true one."""
    call, eviction = rng.uniform(1, 30), rng.uniform(50, 300)
    host = eviction + 1.5 * CALLS * call
    build, built = machine(call=call, eviction=eviction, host=host)
    flattered = difference(build(1)[0], CALLS, FULL)
    assert flattered.microseconds == pytest.approx(call / 2)
    built.clear()
    timing = lengthened(build, CALLS, FULL)
    assert timing.microseconds == pytest.approx(call)
    assert timing.host_share <= MOST_HOST_SHARE
    assert built == list(EVICTIONS[: len(built)])
    assert timing.evictions == built[-1] > 1
    assert timing.compile_seconds == 0.5 * len(built)


def test_what_no_length_helps_has_no_figure():
    build, built = machine(call=3.0, eviction=10.0, host=1000.0)
    with pytest.raises(NoFigureError, match=r"host-bound.*100%"):
        lengthened(build, CALLS, FULL)
    assert built == list(EVICTIONS)
    assert lengthened(build, CALLS, TINY).host_share == 1.0  # whose figures mean nothing


def test_the_host_may_be_slow_in_the_longer_program_alone():
    def replay(which, times):
        return 1.0, (0.1, 0.9)[which]

    with pytest.raises(NoFigureError, match="host-bound"):
        lengthened(lambda evictions: (replay, 0.0), CALLS, FULL)


@pytest.mark.parametrize(
    ("microseconds", "fewest", "said"),
    [
        (10.0, 9.9, None),
        (10.0, 10.1, "copy of the same bytes"),
        (1.25, 0.0, None),  # within the spreads of the smallest call
        (1.0, 0.0, "smallest call"),
        (0.0, 0.0, "0.00"),
        (-3.0, 0.0, "-3.00"),
    ],
)
def test_what_is_faster_than_anything_can_be_is_doubted(microseconds, fewest, said):
    floor = Timing(1.3, 0.05)
    reason = doubtful(Timing(microseconds, 0.02), {"a copy of the same bytes": fewest, "nothing": 0.0}, floor)
    assert (reason is None) == (said is None)
    assert reason is None or said in reason


COPY = Result("copy", Timing(1000.0, 1.0), bytes_moved=4_000_000_000)  # 4 TB/s
FLOOR = Result("floor", Timing(1.3, 0.05))
READ = Result("read", Timing(1000.0, 1.0), bytes_moved=5_000_000_000, reads=True)
MATMUL = Result("matmul", Timing(1000.0, 1.0), operations=800_000_000_000)  # 800 TFLOP/s
ROOFS = Roofs(COPY, READ, MATMUL, FLOOR)


def test_a_figure_at_more_than_the_speed_of_a_copy_becomes_an_error():
    fast = Result("prefill/csa", Timing(10.0, 0.1), bytes_moved=60_000_000)  # 150 % of a copy
    shown = believed(fast, ROOFS, FULL)
    assert shown.timing is None
    assert "15.00" in shown.error
    honest = dataclasses.replace(fast, timing=Timing(15.1, 0.1))
    assert believed(honest, ROOFS, FULL) is honest
    assert believed(fast, ROOFS, TINY) is fast
    host = dataclasses.replace(FLOOR, name="host/step/b64/dispatch", timing=Timing(0.4, 0.0))
    assert believed(host, ROOFS, FULL) is host


def test_what_reads_is_held_to_a_read():
    """A read is faster than a copy of as many bytes; one that is faster than a read is an error all the same."""
    reading = Result("attend", Timing(13.0, 0.1), bytes_moved=60_000_000, reads=True)
    assert believed(reading, ROOFS, FULL) is reading
    assert believed(dataclasses.replace(reading, reads=False), ROOFS, FULL).timing is None
    assert "device read" in believed(dataclasses.replace(reading, timing=Timing(11.9, 0.1)), ROOFS, FULL).error


def test_a_figure_at_more_than_the_speed_of_a_product_becomes_an_error():
    fast = Result("attend", Timing(9.9, 0.1), bytes_moved=1000, operations=8_000_000_000, reads=True)
    assert "matrix product" in believed(fast, ROOFS, FULL).error
    assert "10.00" in believed(fast, ROOFS, FULL).error
    assert believed(dataclasses.replace(fast, timing=Timing(10.1, 0.1)), ROOFS, FULL).error is None


def test_a_run_has_the_errors_in_the_rows(monkeypatch):
    def given(timing):
        return Case("case", run=lambda scale, implementation: Outcome(timing))

    def bound(scale, implementation):
        raise NoFigureError("host-bound: too slow")

    monkeypatch.setattr(runner, "measure_copy", lambda scale: (COPY.timing, COPY.bytes_moved))
    monkeypatch.setattr(runner, "measure_read", lambda scale: (READ.timing, READ.bytes_moved))
    monkeypatch.setattr(runner, "measure_matmul", lambda scale: (MATMUL.timing, MATMUL.operations))
    monkeypatch.setattr(runner, "make_scratch", lambda scale: None)
    monkeypatch.setattr(runner, "floor", lambda scale, implementation: Workload("", None, None, None, (), 1, 1, 0))
    monkeypatch.setattr(runner._States, "time", lambda self, workload: FLOOR.timing)
    cases = [given(Timing(5.0, 0.1)), given(Timing(0.5, 0.1)), Case("bound", run=bound)]
    run = runner.run_cases(cases, FULL)
    assert [result.timing is None for result in run.results] == [False, True, True]
    assert "smallest call" in run.results[1].error
    assert run.results[2].error == "host-bound: too slow"


def test_parts_of_a_step_add_up_to_it():
    found = added([100.0, 300.0, 400.0])
    assert [found[f"{part}_microseconds"] for part in PARTS] == [100.0, 200.0, 100.0]
    assert [found[f"{part}_percent"] for part in PARTS] == [25.0, 50.0, 25.0]
    assert added([100.0, 90.0, 400.0]) == {}
