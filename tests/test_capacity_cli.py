"""`dsv4-jax capacity` as a user runs it: its numbers are those of the arrays, its pictures are pictures."""

import builtins
import json
import re

import pytest
import typer
from typer.testing import CliRunner

from dsv4_jax import CacheFormats, capacity_plan, deepseek_v4_pro, init_cache, tiny_spec
from dsv4_jax.layout.formats import HCA_TAILS, PROFILES
from dsv4_jax.tools.cli.capacity import parse_bytes
from dsv4_jax.tools.cli.main import application


@pytest.fixture
def run():
    runner = CliRunner(env={"COLUMNS": "140"})
    return lambda *arguments: runner.invoke(application(), ["capacity", *arguments])


def cells(output):
    """First column -> the others, of every table line."""
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in output.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def number(text):
    return float(text.replace(",", ""))


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_numbers_are_those_of_a_real_cache(run, hca_tail):
    result = run(
        *("--model", "tiny", "--context", "5000", "--requests", "3", "--formats", "flashmla", "--keys", "mxfp4"),
        *("--hca-tail", hca_tail),
    )
    assert result.exit_code == 0, result.output
    rows = cells(result.output)
    formats = CacheFormats("fp8_ds_mla", "fp8_ds_mla", "mxfp4", hca_tail=hca_tail)
    cache = init_cache(capacity_plan(tiny_spec(), formats, context=5000, requests=3).schema)
    for name, size in cache.memory_bytes().items():
        assert number(rows[name][3]) == size
        assert number(rows[name][2]) * 3 == size
    # Two CSA layers and one HCA layer, from the format table.
    block = 2 * (19008 + 32 * 68) + 1152
    assert number(rows["together"][1]) == block
    assert number(rows["together"][0]) == block / 128
    assert number(rows["together"][3]) == sum(cache.memory_bytes().values())


def test_requests_that_fit_at_each_context(run):
    result = run("--model", "DeepSeek-V4-Pro", "--context", "1048576", "--memory", "141GB")
    assert result.exit_code == 0, result.output
    rows = cells(result.output)
    contexts = [1024, 4096, 16384, 65536, 262144, 1048576]
    assert [context for context in contexts if f"{context:,}" in rows] == contexts
    for context in contexts:
        per_request, fit = map(number, rows[f"{context:,}"])
        plan = capacity_plan(deepseek_v4_pro(), CacheFormats(), context=context, requests=int(fit))
        assert plan.bytes_per_request == per_request
        assert plan.memory_bytes <= 141e9 < plan.memory_bytes + per_request


def test_a_mesh_has_that_many_shards(run):
    one = json.loads(run("--context", "65536", "--memory", "40GB", "--json", "-").output)
    four = json.loads(run("--context", "65536", "--memory", "40GB", "--json", "-", "--mesh", "tensor=2,data=4").output)
    assert (four["mesh"], four["memory"]) == ({"data": 4, "tensor": 2}, one["memory"])
    assert (four["requests"], four["slots"]) == (4 * one["requests"], one["requests"])
    fits = [[each["requests_that_fit"] for each in found["by_context"]] for found in (one, four)]
    assert fits[1] == [4 * fit for fit in fits[0]]
    asked = run("--context", "4096", "--requests", "10", "--mesh", "data=4")
    assert "slots: 3, blocks: 96; on each of 4 devices, 4 shards: 12 slots in all" in " ".join(asked.output.split())
    for wrong in ("4", "data=0", "data=2,data=2", "model=2", "data=2,"):
        refused = run("--context", "4096", "--mesh", wrong)
        assert refused.exit_code == 2
        assert "is no mesh" in refused.output


def test_a_config_file_is_read(run, tmp_path):
    config = {
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
        "compress_ratios": [0, 128],
        "hidden_size": 64,
        "num_attention_heads": 2,
        "rope_scaling": None,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    result = run("--model", str(path), "--context", "1280", "--formats", "bf16")
    assert result.exit_code == 0, result.output
    rows = cells(result.output)
    assert number(rows["together"][1]) == 1024
    assert "csa_entries" not in rows
    assert number(rows["hca_entries"][2]) == 10 * 1024


@pytest.mark.parametrize("memory", [[], ["--memory", "40GB"]], ids=["bytes", "bytes and requests"])
def test_draws_a_picture(run, tmp_path, memory):
    path = tmp_path / "plan.png"
    result = run("--context", "100000", *memory, "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_says_what_to_install(run, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    result = run("--context", "1000", "--plot", str(tmp_path / "plan.png"))
    assert result.exit_code == 2
    assert "dsv4-jax[plot]" in result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "no-such-model"], ["no-such-model", "deepseek-v4-flash", "tiny"]),
        (["--entries", "mxfp4"], ["mxfp4", "fp8_ds_mla", "nvfp4_static"]),
        (["--formats", "smallest"], ["smallest", *PROFILES]),
        (["--memory", "3 horses"], ["3 horses", "GiB"]),
        (["--memory", "1MB"], ["do not hold one request"]),
        (["--context", "99999999"], ["max_context", "1048576"]),
        (["--plot", "/proc/no-such-folder/plan.png"], ["/proc/no-such-folder/plan.png"]),
        (["--plot", "plan.nonsense"], ["plan.nonsense"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_options_are_refused(run, arguments, named):
    result = run("--context", "5000", *arguments)
    assert result.exit_code == 2
    for word in named:
        assert word in result.output


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("141GB", 141 * 10**9),
        ("80 GiB", 80 * 2**30),
        ("1.5tb", 15 * 10**11),
        ("512", 512),
        ("0.5MiB", 2**19),
        ("7kB", 7000),
        ("3B", 3),
    ],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.2.3GB", "1e9", "1 G B"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(typer.BadParameter, match="no amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize("context", ["1", "100", "1000"])
def test_a_short_context_is_drawn_too(run, tmp_path, monkeypatch, context):
    """Every panel shows its points, and where there are two contexts a line."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    result = run("--context", context, "--memory", "40GB", "--plot", str(tmp_path / "capacity.png"))
    assert result.exit_code == 0, result.output
    for axes in drawn[0].axes:
        assert axes.lines
        for line in axes.lines:
            assert line.get_marker() not in (None, "", "None")
            assert len(line.get_xdata()) >= (1 if context == "1" else 2)


def test_a_folder_takes_the_picture(run, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    result = run("--context", "5000", "--plot", str(folder))
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.rglob("*.png")] == ["capacity.png"]
    assert (folder / "capacity.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "capacity.png") in result.output


@pytest.mark.parametrize("command", ["capacity", "plan"])
def test_json(command, tmp_path):
    given = ["--model", "tiny", "--context", "5000", "--memory", "1GB"]
    invoke = CliRunner().invoke
    printed = invoke(application(), [command, *given, "--json", "-"])
    assert printed.exit_code == 0, printed.output
    path = tmp_path / "new" / "capacity.json"
    written = invoke(application(), [command, *given, "--json", str(path)])
    assert written.exit_code == 0, written.output
    found = json.loads(path.read_text())
    assert json.loads(printed.output) == found
    plan = capacity_plan(tiny_spec(), CacheFormats(), context=5000, memory_bytes=10**9)
    assert found["requests"] == plan.requests
    assert found["memory"] == plan.memory_bytes == sum(found["cache"].values())
    assert found["by_context"][-1] == {
        "context": plan.context,
        "per_request": plan.bytes_per_request,
        "requests_that_fit": plan.requests,
    }
