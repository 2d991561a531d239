"""What contributors' tools are told is what scripts/test.sh checks, at the versions that pyproject.toml pins."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOOKS = (ROOT / ".pre-commit-config.yaml").read_text()
CHECKS = (ROOT / "scripts/test.sh").read_text()


def test_hooks_are_the_checks_at_the_pinned_versions():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {name for each in extras["test"] + extras["types"] for name, _ in re.findall(r"^([\w-]+)(==)", each)}
    entries = re.findall(r"entry: (.+)", HOOKS)
    assert {entry.split()[0] for entry in entries} == {"ruff", "clang-format", "mypy"} <= pinned
    # No version of its own: every hook is a program that is installed.
    assert "rev:" not in HOOKS
    assert re.findall(r"repo: (.+)", HOOKS) == ["local"]
    assert re.findall(r"language: (.+)", HOOKS) == ["system"] * len(entries)
    for command in ("ruff check", "ruff format", "clang-format", "mypy"):
        assert any(entry.startswith(command) for entry in entries)
        assert re.search(rf"^(?:find .*)?{command}\b", CHECKS, re.MULTILINE), command


def test_hooks_format_every_file_of_kernels():
    (pattern,) = re.findall(r"files: (\^ffi\S+)", HOOKS)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ffi").rglob("*") if path.is_file()}
    missed = {path for path in sources if not re.search(pattern, path)}
    assert {path for path in missed if "__pycache__" not in path} == {"ffi/dsv4_jax_native.pyi"}


def test_editors_are_told_the_line_length_of_the_checks():
    (told,) = re.findall(r"max_line_length = (\d+)", (ROOT / ".editorconfig").read_text())
    assert int(told) == tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["line-length"]
    assert f"ColumnLimit: {told}\n" in (ROOT / ".clang-format").read_text()
