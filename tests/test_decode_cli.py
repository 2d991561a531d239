"""`dsv4-jax decode` as a user runs it, small."""

import re

import pytest
import typer
from typer.testing import CliRunner

from dsv4_jax.layout.formats import HCA_TAILS
from dsv4_jax.tools.cli.decode import decode

# 132 to 256 tokens a request, whatever the seed: two blocks.
SMALL = ["--requests", "3", "--slots", "2", "--prompt-tokens", "216", "--new-tokens", "40", "--chunk", "64"]


@pytest.fixture
def run():
    application = typer.Typer()
    application.command()(decode)
    runner = CliRunner(env={"COLUMNS": "120"})
    return lambda *arguments: runner.invoke(application, [*SMALL, *arguments])


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_serves_a_file_and_verifies(run, tmp_path, seed, hca_tail):
    text = tmp_path / "text.txt"
    text.write_text("A window, a tail and a table. " * 30)
    result = run("--text", str(text), "--verify", "--seed", str(seed), "--hca-tail", hca_tail)
    assert result.exit_code == 0, result.output

    cells = [re.split("[│┃]", line) for line in result.output.splitlines()]
    rows = {line[1].strip(): line[2].strip() for line in cells if len(line) > 2}
    assert int(rows["tokens with an impossible choice"]) == 0
    assert int(rows["logit vectors compared"]) >= 3 * 40
    components = ["block_table", "window", "window_positions", "csa_entries", "csa_keys", "hca_entries"]
    components += ["csa_tail", "csa_key_tail", "hca_tail"]
    assert sum(_number(rows[name]) for name in components) == _number(rows["together"])
    # 2 slots of 256 tokens, 4 layers, one BF16 row of 512 each.
    assert _number(rows["uncompressed BF16 instead"]) == 2 * 256 * 4 * 512 * 2
    assert "1 for 2 tokens, 1 for 64 tokens" in " ".join(result.output.split())


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def test_fails_when_the_logits_differ(run, monkeypatch):
    """With a tolerance of less than nothing even the right logits are too far off."""
    monkeypatch.setattr("dsv4_jax.example.verify.tolerances", lambda formats: (-1.0, 1.0))
    result = run("--verify", "--tokens-from", "greedy")
    assert result.exit_code == 1
    assert "does not agree" in result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--entries", "fp7"], "fp7"),
        (["--keys", "fp8_ds_mla"], "fp8_ds_mla"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--requests", "0"], "requests"),
    ],
)
def test_bad_options_are_refused(run, arguments, named):
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.output


def test_empty_text_is_refused(run, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    result = run("--text", str(empty))
    assert result.exit_code == 2
    assert "empty" in result.output
