"""What README.md says is so: its code runs, its tables and links match the package."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import dsv4_jax_native
import numpy as np
import pytest
import typer
from served import TINY_CONFIG

from dsv4_jax import ops
from dsv4_jax.deepseek_v4.random_checkpoint import write_random_checkpoint
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.tools.cli.main import application

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def rows_of_table(text: str) -> list[list[str]]:
    """The cells of every table row, header first, separator left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def example() -> str:
    """The README's first example, as a reader saves it."""
    return examples()[0]


def test_the_example_is_short_and_runs():
    code = example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"jax", "dsv4_jax"}
    assert "dsv4_jax." not in code  # public names are all it needs
    names = {}
    exec(compile(code, "README.md", "exec"), names)

    logits = np.asarray(names["logits"])
    assert logits.shape == (4, 256)
    assert np.isfinite(logits).all()
    # Two requests fed the same tokens: one answer, whatever slot they have. Not that of padding.
    np.testing.assert_array_equal(logits[0], logits[1])
    assert (logits[0] != logits[2]).any()
    assert [names["manager"].length(request) for request in names["requests"]] == [5, 5]
    layout = names["plan"].layout
    assert (layout.tokens, layout.requests) == (4, 4)


def test_the_model_says_something(tmp_path, capsys):
    """The second example, with a smaller checkpoint."""
    _, code = examples()
    write_random_checkpoint(tmp_path / "checkpoint", TINY_CONFIG, 0)
    assert "folder = random_checkpoint()" in code
    code = code.replace("random_checkpoint()", f"{str(tmp_path / 'checkpoint')!r}")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "Once upon a time" in printed
    assert "The cache is" in printed
    assert len(names["served"].tokens) == len("The cache is") + 16


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder on the path with the native module alone, as ``site-packages`` has it after ``pip install .``."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(dsv4_jax_native.__file__, folder)
    return folder


def run_python(*arguments: str, folder: Path, path: str) -> subprocess.CompletedProcess:
    """Python in a folder, with PYTHONPATH and, behind it, nothing else of this process's paths but what is installed.

    Without ``site``, since an editable install of this clone would find the package before any path does.
    """
    installed = [place for place in sys.path if "site-packages" in place]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, *installed]), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-S", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_example_runs_in_the_clones_root(installed, tmp_path):
    """Where ``dsv4_jax`` is the source folder, and the native module is wherever it was installed."""
    (tmp_path / "example.py").write_text(example())
    code = (
        f"import runpy; names = runpy.run_path({str(tmp_path / 'example.py')!r});"
        "print(names['dsv4'].__file__, names['logits'].shape)"
    )
    result = run_python("-c", code, folder=ROOT, path=str(installed))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(ROOT / "dsv4_jax" / "__init__.py"), "(4,", "256)"]


def test_the_example_runs_from_elsewhere(installed, tmp_path):
    (installed / "dsv4_jax").exists() or shutil.copytree(
        ROOT / "dsv4_jax", installed / "dsv4_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "example.py").write_text(example() + "print(dsv4.__file__, logits.shape)\n")
    result = run_python("example.py", folder=tmp_path, path=str(installed))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(installed / "dsv4_jax" / "__init__.py"), "(4,", "256)"]


def test_without_the_native_module_one_error_says_what_to_do():
    """In the clone's root before anything was installed: not a traceback of imports, and not at ``import dsv4_jax``."""
    code = "import sys; sys.modules['dsv4_jax_native'] = None\n" + example()
    result = run_python("-c", code, folder=ROOT, path="")
    assert result.returncode == 1
    assert re.search(r"^\S*NativeModuleError: .* Mend it, .* with: pip install", result.stderr, re.M), result.stderr


def test_the_program_runs_as_a_module(installed):
    """``python -m dsv4_jax`` in the clone's root, where no ``dsv4-jax`` may be on the path."""
    result = run_python("-m", "dsv4_jax", "doctor", folder=ROOT, path=str(installed))
    assert "dsv4_jax_native" not in result.stderr, result.stderr
    assert "FFI" in result.stdout, result.stdout
    assert "doctor" in run_python("-m", "dsv4_jax", "--help", folder=ROOT, path=str(installed)).stdout


def test_the_table_of_operations_is_complete():
    named = {name for row in rows_of_table(section("Operations"))[1:] for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(ops.__all__) - {"OperandError", "Implementation"}


def test_the_bytes_of_every_format():
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    header, *rows = rows_of_table(page[: page.index("A format is chosen")])
    names = [name.strip("`") for name in header[1:]]
    for (_, *cells), formats in zip(rows, (ENTRY_FORMATS, WINDOW_FORMATS, KEY_FORMATS), strict=True):
        stated = {name: int(cell) for name, cell in zip(names, cells, strict=True) if cell}
        assert stated == {name: vector_format.row_bytes for name, vector_format in formats.items()}


def test_the_commands_exist():
    commands = typer.main.get_command(application()).commands
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, arguments in re.findall(r"dsv4-jax ([a-z]+)([^`\n#]*)", text):
            options = {option for parameter in commands[name].params for option in parameter.opts}
            assert set(re.findall(r"(?<!\S)--[a-z-]+", arguments)) <= options | {"--help"}, (page, name, arguments)
    shown = {name for name, command in commands.items() if not command.hidden}
    assert shown == {row[0].strip("`").split()[1] for row in rows_of_table(section("Command line"))[1:]}


def test_what_was_run_is_what_is_supported():
    """From the oldest jax, the one that the build is pinned to, up to below the limit; each Python once."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pinned,) = (name[8:] for name in project["build-system"]["requires"] if name.startswith("jaxlib=="))
    _, *rows = rows_of_table(re.search(r"What was run:\n\n(.*?)\n\n", README, re.DOTALL)[1])
    numbers = [[tuple(map(int, cell.split("."))) for cell in row[:2]] for row in rows]
    versions, pythons = zip(*numbers, strict=True)
    bounds = {name: re.findall(r"[>=<]=?([\d.]+)", name) for name in project["project"]["dependencies"]}
    (lowest, limit) = next(bound for name, bound in bounds.items() if name.startswith("jax>"))
    assert rows[0][0] == pinned == lowest
    assert sorted(versions) == list(versions)
    assert versions[-1] < tuple(map(int, limit.split(".")))
    lowest, limit = re.findall(r"(\d+)\.(\d+)", project["project"]["requires-python"])
    assert pythons == tuple((3, minor) for minor in range(int(lowest[1]), int(limit[1])))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_scripts_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, heading
    for script in re.findall(r"scripts/[\w.]+\w", text):
        assert (ROOT / script).exists(), script
