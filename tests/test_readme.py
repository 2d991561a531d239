"""What README.md says is so: its code runs, its tables and links match the package."""

import re
from pathlib import Path

import numpy as np
import typer

from dsv4_jax import PlanLayout, ops
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.tools.cli.main import application

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def rows_of_table(text: str) -> list[list[str]]:
    """The cells of every table row, header first, separator left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_example_is_short_and_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    names = {}
    exec(compile(code, "README.md", "exec"), names)

    logits = np.asarray(names["logits"])
    assert logits.shape == (4, 256)
    assert np.isfinite(logits).all()
    # Two requests fed the same tokens: one answer, whatever slot they have. Not that of padding.
    np.testing.assert_array_equal(logits[0], logits[1])
    assert (logits[0] != logits[2]).any()
    assert [names["manager"].length(request) for request in names["requests"]] == [5, 5]
    assert names["plan"].layout == PlanLayout(4, 4)


def test_the_table_of_operations_is_complete():
    named = {name for row in rows_of_table(section("Operations"))[1:] for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(ops.__all__) - {"OperandError"}


def test_the_bytes_of_every_format():
    header, *rows = rows_of_table(section("Formats"))
    names = [name.strip("`") for name in header[1:]]
    for (_, *cells), formats in zip(rows, (WINDOW_FORMATS, ENTRY_FORMATS, KEY_FORMATS), strict=True):
        stated = {name: int(cell) for name, cell in zip(names, cells, strict=True) if cell}
        assert stated == {name: vector_format.row_bytes for name, vector_format in formats.items()}


def test_the_commands_exist():
    named = set(re.findall(r"dsv4-jax (\w+)", README))
    commands = typer.main.get_command(application()).commands
    assert named <= set(commands)
    assert set(commands) == {row[0].strip("`").split()[1] for row in rows_of_table(section("Command line"))[1:]}


def test_links_and_scripts_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"scripts/[\w.]+", README):
        assert (ROOT / target).exists(), target
