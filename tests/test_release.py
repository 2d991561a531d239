"""What a release is made of and by: every fact that its scripts, its workflow and pyproject.toml all state is one."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import dsv4_jax_native
import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = (ROOT / ".github/workflows/publish.yml").read_text()


def bounds(specifier: str) -> list[tuple[int, int]]:
    """The first two numbers of a lower bound and of a limit."""
    return [(int(major), int(minor)) for major, minor in re.findall(r"(?:>=|<)(\d+)\.(\d+)", specifier)]


def test_the_matrix_has_every_supported_python_and_jax():
    (listed,) = re.findall(r"^supported=\((.*)\)", (ROOT / "scripts/matrix.sh").read_text(), re.MULTILINE)
    (lowest_python, python_limit) = bounds(PYPROJECT["project"]["requires-python"])
    (lowest_jax, jax_limit) = bounds(
        next(one for one in PYPROJECT["project"]["dependencies"] if one.startswith("jax>"))
    )
    pythons = [f"3.{minor}" for minor in range(lowest_python[1], python_limit[1])]
    jaxes = [f"0.{minor}" for minor in range(lowest_jax[1], jax_limit[1])]
    assert listed.split() == [f"{python}:{jax}" for python, jax in zip(pythons, jaxes, strict=True)][::-1]


def test_one_module_serves_every_python():
    ((major, minor), _) = bounds(PYPROJECT["project"]["requires-python"])
    assert PYPROJECT["tool"]["scikit-build"]["wheel"]["py-api"] == f"cp{major}{minor}"
    (limited,) = re.findall(r"#define Py_LIMITED_API 0x(\w+)", (ROOT / "ffi/module.cc").read_text())
    assert int(limited, 16) == (major << 24) + (minor << 16)
    assert Path(dsv4_jax_native.__file__).name == "dsv4_jax_native.abi3.so"


def test_the_workflow_runs_what_is_pinned_and_may_do_no_more_than_it_must():
    used = re.findall(r"(?:uses|container): (\S+)", WORKFLOW)
    assert len(used) == 5
    for one in used:
        assert re.fullmatch(r"[\w./-]+@([0-9a-f]{40}|sha256:[0-9a-f]{64})", one), one
    assert re.search(r"^permissions: \{\}$", WORKFLOW, re.MULTILINE)
    assert re.findall(r"(\S+): (?:write|read)$", WORKFLOW, re.MULTILINE) == ["contents", "id-token"]
    assert "secrets." not in WORKFLOW
    (script,) = re.findall(r"bash (\S+)", WORKFLOW)
    assert (ROOT / script).exists()


@pytest.mark.parametrize("tag", ["v" + PYPROJECT["project"]["version"], "v0.0.0", "v"])
def test_a_tag_of_another_version_is_refused(tag):
    (check,) = re.findall(r"run: (grep .*)", WORKFLOW)
    found = subprocess.run(["sh", "-c", check], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}).returncode == 0
    assert found == (tag == "v" + PYPROJECT["project"]["version"])


def test_the_source_distribution_builds_the_package_and_holds_no_more(tmp_path):
    pytest.importorskip("scikit_build_core")
    code = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=60, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        held = {name.partition("/")[2] for name in members.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("dsv4_jax", "ffi")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    about = {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"}
    assert held == sources | about
