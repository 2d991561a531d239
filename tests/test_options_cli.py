"""Every option of every command: what cannot be is refused in one line before any work, and Ctrl-C ends in one line."""

import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from served import TINY_CONFIG
from typer.testing import CliRunner

from dsv4_jax.deepseek_v4.random_checkpoint import write_random_checkpoint
from dsv4_jax.tools.cli.main import application

HUGE = ["1000000000", "99999999999", str(10**30)]
BELOW = ["-1", "-99999999999"]
NO_SUCH = "no/such/folder/file"
NO_FOLDER = "/proc/no-such-folder/file.png"  # nobody, not even root, makes folders there

# For each command and option: values that must be refused, each with exit code 2 and no traceback.
REFUSED = {
    "decode": {
        "--checkpoint": [NO_SUCH, ".", "/dev/null"],
        "--prompt": [""],
        "--text": [NO_SUCH, "."],
        "--requests": ["0", *BELOW, *HUGE],
        "--slots": ["0", *BELOW, *HUGE],
        "--prompt-tokens": ["0", *BELOW, *HUGE, "1048576"],
        "--new-tokens": ["0", *BELOW, *HUGE, "1048576"],
        "--chunk": ["0", *BELOW, *HUGE],
        "--tokens-from": ["nowhere"],
        "--entries": ["fp7"],
        "--window": ["nvfp4"],
        "--keys": ["fp8_ds_mla"],
        "--hca-tail": ["none"],
        "--seed": [*BELOW, *HUGE[1:]],
        "--implementation": ["other"],
        "--attention": ["other"],
        "--dtype": ["float16"],
        "--speculate": ["0", "40", "65", "some", *BELOW, *HUGE],
        "--temperature": ["-1", "nan", "inf", "1e9", "hot"],
        "--mesh": ["", "4", "data=0", "model=2", "tensor=3", "data=9999", *HUGE],
        "--top-p": ["-1", "0", "1.1", "nan", "all"],
    },
    "capacity": {
        "--context": ["0", *BELOW, *HUGE],
        "--model": [NO_SUCH, ".", "/dev/null"],
        "--formats": ["smallest"],
        "--entries": ["fp7"],
        "--window": ["nvfp4"],
        "--keys": ["fp8_ds_mla"],
        "--hca-tail": ["none"],
        "--memory": ["", "-1", "0", "many", "1e400GB"],
        "--requests": ["0", *BELOW, str(10**30)],
        "--lookahead": [*BELOW, *HUGE],
        "--mesh": ["", "4", "data=0", "data=2,data=2", "model=2", "data=1e3", *HUGE],
        "--json": [".", NO_FOLDER],
        "--plot": [NO_FOLDER, "picture.nonsense"],
    },
    "bench": {
        "--only": ["(", "no such case"],
        "--json": [".", NO_FOLDER],
        "--plot": [NO_FOLDER, "picture.nonsense"],
    },
    "trace": {
        "--steps": ["0", *BELOW, *HUGE],
        "--requests": ["0", *BELOW, *HUGE],
        "--context": ["0", *BELOW, *HUGE, "1048576"],
        "--model": [],
        "--logdir": [NO_FOLDER, "/dev/null"],
    },
    "doctor": {},
}
NEEDED = {"capacity": ["--context", "1000"], "bench": ["--tiny"]}
# Switches, and numbers of which every one that can be written is as good as another.
HARMLESS = {"--help", "--hadamard", "--verify", "--quick", "--reference", "--tiny", "--list", "--share-prefix"}


def commands():
    import typer.main

    return {name: one for name, one in typer.main.get_command(application()).commands.items() if name != "plan"}


def test_every_option_is_here():
    for name, command in commands().items():
        options = {option.opts[0] for option in command.params} - HARMLESS
        assert options == set(REFUSED[name]), name


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (command, option, value)
        for command, all in REFUSED.items()
        for option, values in all.items()
        for value in values
    ],
)
def test_what_cannot_be_is_refused_before_any_work(command, option, value, monkeypatch, tmp_path):
    def work(*arguments, **options):
        raise AssertionError("the command began to work")

    monkeypatch.setattr("dsv4_jax.deepseek_v4.checkpoint.load_checkpoint", work)
    monkeypatch.setattr("dsv4_jax.deepseek_v4.random_checkpoint.random_checkpoint", work)
    monkeypatch.setattr("dsv4_jax.tools.cli.bench.run_cases", work)
    monkeypatch.setattr("dsv4_jax.tools.cli.trace.trace_steps", work)
    monkeypatch.setattr("dsv4_jax.tools.cli.capacity.draw", work)
    monkeypatch.chdir(tmp_path)
    given = [] if option == "--context" else NEEDED.get(command, [])
    result = CliRunner().invoke(application(), [command, *given, option, value])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_read_only_file_is_found_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv4_jax.tools.cli.bench.run_cases", lambda *_, **__: pytest.fail("measured"))
    folder = tmp_path / "closed"
    folder.mkdir()
    monkeypatch.setattr(Path, "open", _refuse)  # the tests may run as root, whom no permission stops
    result = CliRunner().invoke(application(), ["bench", "--tiny", "--json", str(folder / "bench.json")])
    assert result.exit_code == 2
    assert "cannot write" in result.output


def _refuse(self, *arguments, **options):
    raise PermissionError(13, "Permission denied")


def test_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", {"dsv4-jax": "1.2.3"}.__getitem__)
    result = CliRunner().invoke(application(), ["--version"])
    assert result.exit_code == 0
    assert result.output.split() == ["dsv4-jax", "1.2.3"]


def test_version_of_a_source_folder(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    result = CliRunner().invoke(application(), ["--version"])
    assert result.exit_code == 0
    assert "not installed" in result.output


def test_numbers_are_whole_in_a_narrow_terminal():
    arguments = ["capacity", "--model", "deepseek-v4-pro", "--context", "1048576", "--memory", "141GB"]
    narrow, wide = (CliRunner(env={"COLUMNS": width}).invoke(application(), arguments) for width in ("40", "200"))
    assert narrow.exit_code == wide.exit_code == 0
    tables = [re.findall(r"[\d,.]+", "".join(re.findall(r"│.*│", one.output))) for one in (narrow, wide)]
    assert tables[0] == tables[1]
    assert "…" not in narrow.output


def test_ctrl_c_ends_decode_with_one_line(tmp_path):
    write_random_checkpoint(tmp_path / "checkpoint", TINY_CONFIG, 0)
    # A background process may have been started with SIGINT ignored; a user's has not.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from dsv4_jax.tools.cli.main import main; sys.exit(main())"
    )
    arguments = ["decode", "--requests", "64", "--slots", "2", "--prompt-tokens", "300", "--new-tokens", "4000"]
    arguments += ["--checkpoint", str(tmp_path / "checkpoint")]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"COLUMNS": "100", "FORCE_COLOR": "1", "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        for line in _pieces(process.stdout):
            if "decode" in line:  # both shapes of step are compiled, and steps are on their way
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)  # a loop that dispatched far ahead would take longer
    assert process.returncode == 130
    assert "Traceback" not in output + errors
    assert re.search(r"Interrupted after [\d,]+ tokens\.", output)


def _pieces(stream):
    """What a stream says, as it comes."""
    while piece := stream.read(64):
        yield piece


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"), "not enough memory"),
        (RuntimeError("Unable to initialize backend 'cuda': none"), "doctor"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, said, monkeypatch, capsys):
    from dsv4_jax.tools.cli import main

    def program():
        raise error

    monkeypatch.setattr(main, "application", lambda **_: program)
    with pytest.raises(SystemExit) as raised:
        main.main()
    assert raised.value.code == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
