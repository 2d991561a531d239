"""One version: pyproject.toml's, which the package, the program and CHANGELOG.md tell."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dsv4_jax
from dsv4_jax.version import installed_version

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_version_is_that_of_the_installed_package(monkeypatch, tmp_path):
    folder = tmp_path / "dsv4_jax-7.8.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-jax\nVersion: 7.8.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_version() == "7.8.9"


def test_a_source_folder_has_no_version(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert installed_version() is None


def test_what_is_installed_here_is_this():
    if installed_version() is None:
        assert dsv4_jax.__version__ == "0+unknown"
        pytest.skip("dsv4-jax is not installed here, its source folder is on the path")
    assert dsv4_jax.__version__ == VERSION
