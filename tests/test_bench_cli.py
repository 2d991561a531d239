"""`dsv4-jax bench` and `dsv4-jax trace` as a user runs them, and the bytes they count; no time is looked at."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dsv4_jax import CacheFormats, CacheSchema, LayerKind, tiny_spec
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.tools.bench import decode, formats, measure, reads, traffic
from dsv4_jax.tools.bench.cases import all_cases
from dsv4_jax.tools.bench.runner import run_cases
from dsv4_jax.tools.bench.targets import TARGETS
from dsv4_jax.tools.bench.trace import Op, instructions
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import FULL, TINY, model_of, noise, schema_of
from dsv4_jax.tools.cli.bench import bench
from dsv4_jax.tools.cli.trace import trace

SWA, CSA, HCA = LayerKind


@pytest.fixture
def run():
    def invoke(command, *arguments):
        application = typer.Typer()
        application.command()(command)
        return CliRunner().invoke(application, arguments)

    return invoke


# Bytes, counted row by row: a set of (position, half) for everything that is read or written.


def halves(position, ratio):
    return [(position, half) for half in (("overlap", "current") if ratio == 4 else ("current",))]


def pooled(entry, ratio):
    """What an entry pools: the overlap halves of the window before (CSA) and the current halves of its own."""
    rows = {(position, "current") for position in range(ratio * entry, ratio * (entry + 1))}
    if ratio == 4 and entry > 0:
        rows |= {(position, "overlap") for position in range(ratio * (entry - 1), ratio * entry)}
    return rows


def count(start, tokens, ratio):
    """(halves brought, halves kept in the tail, halves read from it, halves of the step pooled, entries closed)."""
    end = start + tokens
    brought = {half for position in range(start, end) for half in halves(position, ratio)}
    closed = [entry for entry in range(end // ratio + 1) if start < ratio * (entry + 1) <= end]
    read = set().union(*(pooled(entry, ratio) for entry in closed))
    later = pooled(end // ratio, ratio) | pooled(end // ratio + 1, ratio)
    return len(brought), len(brought & later), len(read - brought), len(read & brought), len(closed)


def random_shape(rng, ratio):
    starts = rng.integers(0, 3 * ratio + 2, 5)
    starts[0] = 0
    return StepShape(starts, rng.integers(1, 3 * ratio, 5))


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_of_writes(ratio, itemsize, rng):
    shape, format = random_shape(rng, ratio), ENTRY_FORMATS["fp8"]
    counted = [count(*pair, ratio) for pair in zip(shape.starts.tolist(), shape.counts.tolist(), strict=True)]
    brought, kept, read, pooled_now, closed = map(sum, zip(*counted, strict=True))
    stored = 448 + 2 * 64 + 4
    # Two values, kv and gate, of 512 channels in every half.
    assert traffic.projections(shape, ratio, 512, itemsize) == 2 * brought * 512 * itemsize
    assert traffic.append_tail(shape, ratio, 512, itemsize) == 2 * kept * 512 * (itemsize + 4)
    expected = 2 * 512 * (read * 4 + pooled_now * itemsize) + closed * 512 * 4
    assert traffic.compress(shape, ratio, 512, itemsize) == expected
    assert traffic.flush(shape, ratio, format) == closed * (512 * 4 + stored)
    expected = 2 * 512 * (brought * itemsize + (kept + read) * 4) + closed * stored
    assert traffic.compressor(shape, ratio, format, itemsize) == expected


@pytest.mark.parametrize("ratio", [4, 128])
def test_bytes_of_rotate(ratio, rng):
    shape, rows = random_shape(rng, ratio), 12 if ratio == 4 else 128
    cleared = 0
    for start, end in zip(shape.starts.tolist(), shape.ends.tolist(), strict=True):
        if start // ratio < end // ratio:
            later = pooled(end // ratio, ratio) | pooled(end // ratio + 1, ratio)
            cleared += rows - sum(position < end for position, _ in later)
    assert traffic.rotate(shape, ratio, 512) == 2 * cleared * 512 * 4


def test_bytes_of_an_update_in_words():
    """One CSA token at position 7, which closes entry 1: everything counted by hand."""
    shape = StepShape(np.array([7]), np.array([1]))
    window = 512 * 2 + (448 + 128 + 4) + 4
    projections = 2 * 1024 * 4 + 2 * 256 * 4
    # Read: overlap of 0..3 and current of 4..6. Written: the overlap half of 7; its current half is spent.
    tails = (7 + 1) * 2 * (512 + 128) * 4
    entry_and_key = (448 + 128 + 4) + (64 + 8 + 4)
    schema = schema_of(model_of(CSA, 1), 1, 128)
    assert decode.update_bytes(CSA, shape, schema, 4) == window + projections + tails + entry_and_key


def test_bytes_of_an_update_with_a_running_tail_in_words():
    """Three HCA tokens: one begins a window, one goes on with one, one closes one."""
    shape = StepShape(np.array([0, 5, 127]), np.array([1, 1, 1]))
    windows = 3 * (512 * 2 + (448 + 128 + 4) + 4)
    projections, state, entry = 3 * 2 * 512 * 4, 3 * 512 * 4, 448 + 128 + 4
    schema = schema_of(model_of(HCA, 1), 3, 128, "running")
    assert decode.update_bytes(HCA, shape, schema, 4) == windows + projections + (2 + 2) * state + entry


def test_bytes_of_window_rows_that_outlive_a_prefill():
    shape = StepShape(np.array([0, 10]), np.array([1000, 20]))
    assert traffic.window_rows(shape, 128, WINDOW_FORMATS["bf16"], 4) == (128 + 20) * (512 * 4 + 512 * 2 + 4)


def test_bytes_of_reads():
    made = reads.entries(2, TINY, "native")
    assert made.bytes_moved == 2 * 16 * (4 + (448 + 128 + 4) + 512 * 2 + 4 + 1)
    made = formats.gather("keys", KEY_FORMATS["mxfp4"], TINY, "native")
    assert made.bytes_moved == 2 * 64 * ((64 + 4) + 128 * 2 + 4 + 1)
    made = formats.dequantize("keys", KEY_FORMATS["bf16"], TINY, "native")
    assert made.bytes_moved == 8 * 4 * (256 + 256)


def test_every_target_has_its_case():
    assert all(target.try_for <= target.at_most for target in TARGETS.values())
    names = {case.name for case in all_cases(FULL)}
    assert set(TARGETS) <= names
    assert len(names) == len(all_cases(FULL))


@pytest.mark.parametrize(("kind", "share"), [(CSA, 1 / 4), (HCA, 1 / 128)])
def test_mixed_boundaries_close_as_many_windows_as_a_long_decode(kind, share):
    for batch in (64, 256):
        shapes = decode.decode_shapes(kind, "mixed", batch, FULL)
        assert np.mean([shape.closing(kind.ratio) for shape in shapes]) == batch * share
    for boundary, expected in (("none", 0), ("all", 64)):
        assert {shape.closing(kind.ratio) for shape in decode.decode_shapes(kind, boundary, 64, FULL)} == {expected}


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_noise_is_finite_in_every_format(dtype):
    values = np.asarray(noise((3, 5, 1000), dtype).astype(jnp.float32))
    limit = 63 if dtype == jnp.uint8 else 1
    assert np.abs(values).max() <= limit
    assert len(np.unique(values)) > (32 if dtype == jnp.uint8 else 200)
    assert not np.array_equal(values, np.asarray(noise((3, 5, 1000), dtype, 1).astype(jnp.float32)))


def test_a_program_makes_the_calls_it_says():
    """Every call of a program is one on other slots: all their window rows end up changed."""
    made = decode.update(CSA, "rows", "mixed", 4, TINY, "native")
    before = made.state()
    kept = np.asarray(before.window)
    calls = 2 * made.calls
    jitted = jax.jit(measure.program(made, calls), donate_argnums=(0, 1))
    lowered = jitted.lower(measure.make_scratch(TINY), before, made.gates, made.operands)
    assert measure.native_calls(lowered.compile()) == calls
    _, after, _ = jitted(measure.make_scratch(TINY), before, made.gates, made.operands)
    changed = (np.asarray(after.window) != kept).any(axis=-1)
    assert changed.sum() == calls * 4


def test_a_step_that_verifies_drafts_fits_the_context():
    for shape in decode.decode_shapes(CSA, "mixed", 64, FULL, tokens=4):
        assert shape.tokens == 256
        assert shape.ends.max() <= FULL.context
        assert shape.closing(4) == 64


def test_calls_that_the_compiler_merges_are_an_error():
    merged = formats.quantize("keys", KEY_FORMATS["fp8"], TINY, "native")
    merged = dataclasses.replace(merged, operands=merged.operands[:1], calls=2)
    with pytest.raises(RuntimeError, match="calls"):
        measure.measure(merged, None, measure.make_scratch(TINY), TINY)


def test_a_failing_case_does_not_stop_the_others():
    def broken(scale, implementation):
        raise ValueError("out of luck\nand more")

    floor, other, *_ = all_cases(TINY)
    results = run_cases([floor, dataclasses.replace(other, build=broken), other], TINY).results
    assert [result.error for result in results] == [None, "ValueError: out of luck", None]


def test_bench_runs_every_case_and_writes_json_and_a_picture(run, tmp_path):
    figures, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    result = run(bench, "--tiny", "--json", str(figures), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["device"] == jax.devices()[0].device_kind
    assert found["versions"]["jax"] == jax.__version__
    assert found["scale"]["name"] == "tiny"
    assert found["copy"]["bytes"] == 2 * found["read"]["bytes"] == 2 * TINY.copy_bytes
    assert found["matmul"]["operations"] == 2 * TINY.matmul_size**3
    assert {"command", "date", "driver", "driver_cuda"} <= found.keys()
    names = [case["name"] for case in found["cases"]]
    assert names == [case.name for case in all_cases(TINY)]
    for case in found["cases"]:
        assert {"microseconds", "spread", "bytes", "gigabytes_per_second"} <= case.keys()
        assert "error" not in case
        attends = case["name"].startswith(("attend", "index_topk", "step/flash", "life/drafts"))
        reads = attends or case["name"].startswith("model")
        assert ("percent_of_read" if reads else "percent_of_copy") in case
        assert ("percent_of_matmul" in case) == attends
        assert case["name"] in result.output
    step = next(case for case in found["cases"] if case["name"] == "step/pro/b2")
    assert step["native_calls"] == 1 + 4
    step = next(case for case in found["cases"] if case["name"] == "step/flash/b2")
    assert step["native_calls"] == 1 + 3 * 2 + 2 * 2  # begin; two CSA layers; an SWA and an HCA layer
    assert step["temporary_megabytes"] < 64
    model = next(case for case in found["cases"] if case["name"] == "model/flash/b2/256")
    assert model["native_calls"] == 1 + 3 + 2  # begin; a CSA and an HCA layer
    assert model["tokens_per_second"] == pytest.approx(2e6 / model["microseconds"], abs=0.1)
    assert (model["layers"], model["experts"]) == (2, 8)
    assert 2 <= model["experts_chosen"] <= 4
    check_lifecycle({case["name"]: case for case in found["cases"] if case["name"].startswith("life/")})
    assert "tokens/s" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def check_lifecycle(cases):
    """A slot moves whole, but for its rows of the tables; a request's blocks do not move within the device."""
    assert cases["life/drafts/2x4"]["native_calls"] == 1 + 3 * 2 + 2 * 2
    schema = CacheSchema(tiny_spec(), CacheFormats(), 3, 15, 640, snapshots=2)
    block, tables = schema.bytes_per_block, schema.table_bytes
    slot, snapshot = schema.bytes_per_slot - tables, schema.bytes_per_snapshot - tables
    for tokens, blocks, padded in ((256, 3, 4), (512, 5, 8)):
        moved = {name.split("/")[1]: case["bytes"] for name, case in cases.items() if name.endswith(f"/{tokens}")}
        assert (moved["hit"], moved["fork"]) == (2 * snapshot, 2 * (slot + block))
        assert moved["preempt"] == moved["resume"] == slot + padded * block
        assert moved["save"] == moved["load"]
        assert slot + blocks * block < moved["save"] < slot + blocks * block + 10_000
        assert moved["recompute"] is None


def test_bench_times_the_reference_too(run, tmp_path):
    figures = tmp_path / "bench.json"
    only = "gather/window/b4|op/compress/csa/b4|attend/csa/h2/fp8/b2"
    result = run(bench, "--tiny", "--reference", "--only", only, "--json", str(figures))
    assert result.exit_code == 0, result.output
    assert all("reference_microseconds" in case for case in json.loads(figures.read_text())["cases"])


def test_the_reference_is_computed_in_full():
    """A read that nothing uses is removed from the jnp definition; the program must use all of it."""
    made = dataclasses.replace(reads.window(4, TINY, "reference"), calls=1)
    lowered = jax.jit(measure.program(made, 1)).lower(
        measure.make_scratch(TINY), made.state(), made.gates, made.operands
    )
    assert "bf16[4,128,512]" in lowered.compile().as_text()


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--only", "("], "regular expression"), (["--only", "no such case"], "--list")]
)
def test_bad_options_are_refused(run, arguments, named):
    result = run(bench, "--tiny", *arguments)
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())


def test_list_shows_the_names(run):
    result = run(bench, "--tiny", "--list", "--quick")
    assert result.exit_code == 0
    assert result.output.split() == [case.name for case in all_cases(TINY) if case.quick]


def traced(result):
    """Calls a step of each (layer, scope, op), and the percentages of what is below them."""
    assert result.exit_code == 0, result.output
    cells = [[cell.strip() for cell in re.split("[│┃]", line)] for line in result.output.splitlines()]
    rows = [row for row in cells if len(row) > 7 and row[7].replace(".", "").isdigit()]
    shares = {row[1]: float(row[7]) for row in rows if not row[2]}
    assert shares.keys() == {"together", "update", "index_topk", "attend", "everything else"}
    assert shares.pop("together") == pytest.approx(sum(shares.values()), abs=0.3)
    assert all(0 < share < 100 for share in shares.values())
    return {tuple(row[1:4]): float(row[4]) for row in rows if row[2]}


def test_trace_names_every_op(run, tmp_path):
    calls = traced(run(trace, "--steps", "2", "--requests", "2", "--context", "256", "--logdir", str(tmp_path)))
    # Calls a step: a layer of each kind, and a second CSA layer.
    expected = {("step", "begin", "begin_step"): 1}
    expected |= {(kind, "update", f"update_{kind}"): n for kind, n in (("swa", 1), ("csa", 2), ("hca", 1))}
    attends = {"swa": "window", "csa": "entries", "hca": "all_entries"}
    expected |= {(kind, "attend", f"attend_{attends[kind]}"): n for kind, n in (("swa", 1), ("csa", 2), ("hca", 1))}
    expected |= {("csa", "index_topk", "index_topk"): 2}
    assert {op: calls.get(op) for op in expected} == expected
    assert list(tmp_path.glob("**/*.xplane.pb"))


def test_trace_of_the_whole_model(run):
    calls = traced(run(trace, "--model", "--steps", "2", "--requests", "2", "--context", "256"))
    assert calls["step", "begin", "begin_step"] == calls["csa", "index_topk", "index_topk"] == 1
    assert calls["csa", "attend", "attend_entries"] == calls["hca", "attend", "attend_all_entries"] == 1
    for scope in ("projections", "streams", "routing", "experts", "shared_expert", "head"):
        assert calls["model", scope, "XLA"] > 0


def test_instructions_belong_to_their_innermost_scope():
    text = """
  %add.1 = f32[2]{0} add(%a, %b), metadata={op_name="jit(step)/model.shared_expert/model.experts/while/body/add"}
  %while.2 = (s32[], f32[2]{0}) while(%tuple), condition=%c, body=%b, metadata={op_name="jit(step)/model.experts/while"}
  ROOT %attend = f32[2] custom-call(%x), custom_call_target="dsv4_attend_entries", metadata={op_name="a/csa.attend/b"}
  %copy.3 = f32[2]{0} copy(%a)
"""
    assert instructions(text) == {
        "add.1": Op("model", "experts", "XLA"),
        "attend": Op("csa", "attend", "attend_entries"),
        "copy.3": Op("step", "other", "XLA"),
    }
