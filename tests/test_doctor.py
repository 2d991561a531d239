"""`dsv4-jax doctor` and the check of the FFI API version: every problem is found, and names what mends it."""

import dataclasses
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jax
import pytest
import typer
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from dsv4_jax.native import compatibility
from dsv4_jax.tools.cli import _supported, _topology, doctor
from dsv4_jax.tools.cli.main import application

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = {
    "dsv4_begin_step",
    "dsv4_append_window",
    "dsv4_append_tail",
    "dsv4_compress",
    "dsv4_flush",
    "dsv4_rotate",
    "dsv4_gather_entries",
    "dsv4_gather_all_entries",
    "dsv4_gather_window",
    "dsv4_attend_window",
    "dsv4_attend_entries",
    "dsv4_attend_all_entries",
    "dsv4_index_topk",
    "dsv4_normalize",
    "dsv4_update_swa",
    "dsv4_update_csa",
    "dsv4_update_hca",
    "dsv4_quantize",
    "dsv4_dequantize",
    "dsv4_transfer",
    "dsv4_save_displaced",
}

HEALTHY = doctor.Facts(
    versions={
        "python": "3.12.3",
        "dsv4-jax": "0.1.0",
        "jax": "0.11.2",
        "jaxlib": "0.11.2",
        "numpy": "2.4.0",
        "jax-cuda12-plugin": None,
        "jax-cuda12-pjrt": None,
        "jax-cuda13-plugin": "0.11.2",
        "jax-cuda13-pjrt": "0.11.2",
    },
    bounds={"python": ">=3.11,<3.14", "jax": ">=0.10.2,<0.13", "jaxlib": ">=0.10.2,<0.13", "numpy": ">=2.0"},
    devices=("gpu: NVIDIA H200", "cpu: cpu"),
    platforms=frozenset({"gpu", "cpu"}),
    gpu_present=True,
    driver_cuda=13000,
    ffi_built=(0, 3),
    ffi_running=(0, 4),
    cuda_built=13000,
    native_file="/site-packages/dsv4_jax_native.so",
    architectures=("90",),
    capabilities=("9.0",),
)


def with_versions(**changed: str | None) -> doctor.Facts:
    names = {name.replace("_", "-"): version for name, version in changed.items()}
    return dataclasses.replace(HEALTHY, versions={**HEALTHY.versions, **names})


def test_healthy_machine_has_no_problems():
    assert doctor.find_problems(HEALTHY) == []


def test_machine_without_gpu_has_no_problems():
    cpu = dataclasses.replace(
        with_versions(jax_cuda13_plugin=None, jax_cuda13_pjrt=None),
        devices=("cpu: cpu",),
        platforms=frozenset({"cpu"}),
        gpu_present=False,
        driver_cuda=None,
        cuda_built=0,
    )
    assert doctor.find_problems(cpu) == []


@pytest.mark.parametrize(
    ("facts", "fatal", "text", "command"),
    [
        (dataclasses.replace(HEALTHY, jax_error="RuntimeError: no"), True, "RuntimeError: no", "jaxlib==0.11.2"),
        (dataclasses.replace(HEALTHY, native_problem=("broken", "mend it")), True, "broken", "mend it"),
        (with_versions(jax_cuda13_plugin="0.11.0"), False, "jax-cuda13-plugin 0.11.0", '"jax[cuda13]==0.11.2"'),
        (with_versions(jax_cuda12_pjrt="0.10.2"), False, "jax-cuda12-pjrt 0.10.2", '"jax[cuda12]==0.11.2"'),
        (dataclasses.replace(HEALTHY, platforms=frozenset({"cpu"})), False, "does not use it", "jax[cuda13]==0.11.2"),
        (
            dataclasses.replace(HEALTHY, platforms=frozenset({"cpu"}), driver_cuda=12080),
            False,
            "does not use it",
            "jax[cuda12]==0.11.2",
        ),
        (
            dataclasses.replace(HEALTHY, platforms=frozenset({"cpu"}), jax_platforms="cpu"),
            False,
            "JAX_PLATFORMS=cpu",
            "unset JAX_PLATFORMS",
        ),
        (dataclasses.replace(HEALTHY, cuda_built=0), True, "built without CUDA", "DSV4_CUDA=ON pip install"),
        (dataclasses.replace(HEALTHY, driver_cuda=12080), True, "CUDA 12.8", "CUDACXX="),
        (with_versions(python="3.14.0"), False, "python 3.14.0 is outside", "python3.13 -m venv"),
        (with_versions(jax="0.13.0"), False, "(>=0.10.2,<0.13)", 'pip install "jax>=0.10.2,<0.13"'),
        (with_versions(numpy="1.26.4"), False, "numpy 1.26.4", 'pip install "numpy>=2.0"'),
        (
            with_versions(jax_cuda14_plugin="0.11.2"),
            False,
            "jax-cuda14-plugin is not",
            "pip uninstall jax-cuda14-plugin",
        ),
        (dataclasses.replace(HEALTHY, capabilities=("7.5",)), True, "need 8.0 or later", "JAX_PLATFORMS=cpu"),
        (dataclasses.replace(HEALTHY, capabilities=("8.0",)), True, "compute capability 8.0", "CUDAARCHS=80 "),
        (dataclasses.replace(HEALTHY, capabilities=("9.0", "12.0")), True, "capability 12.0", "CUDAARCHS=120 "),
    ],
)
def test_problem_is_found_with_its_command(facts, fatal, text, command):
    (problem,) = doctor.find_problems(facts)
    assert problem.fatal == fatal
    assert text in problem.text
    assert command in problem.command


def test_what_is_known_to_work_is_shown():
    shown = dict(doctor._rows(dataclasses.replace(HEALTHY, capabilities=("9.0",))))
    assert shown["python"] == "3.12.3 (known to work: >=3.11,<3.14)"
    assert shown["jax"] == "0.11.2 (known to work: >=0.10.2,<0.13)"
    assert shown["driver"] == "up to CUDA 13.0 (needed: 13.0 or later)"
    assert shown["GPU tests"] == "ran on compute capability 9.0"
    other = dict(doctor._rows(dataclasses.replace(HEALTHY, capabilities=("12.0",))))
    assert other["GPU tests"] == "were not run on one of 12.0"


def test_bounds_are_those_of_pyproject(monkeypatch, tmp_path):
    """Whether they are read from what is installed or from the source folder."""
    stated = {"python": PROJECT["requires-python"]}
    for requirement in PROJECT["dependencies"]:
        name, bounds = re.fullmatch(r"([a-z]+)(.*)", requirement).groups()
        stated[name] = bounds

    def none_is_installed(name):
        raise metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "metadata", none_is_installed)
        patch.setattr(_supported, "__file__", str(ROOT / "dsv4_jax/tools/cli/_supported.py"))
        assert _supported.stated_bounds() == stated
        patch.setattr(_supported, "__file__", str(tmp_path / "site-packages/dsv4_jax/tools/cli/_supported.py"))
        assert _supported.stated_bounds() == {}

    folder = tmp_path / "dsv4_jax-7.8.9.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: dsv4-jax", "Version: 7.8.9", "Requires-Python: <3.99,>=3.50"]
    lines += ["Requires-Dist: jax>=7,<8", "Requires-Dist: jax[cuda13]>=0.10.2; extra == 'cuda13'"]
    (folder / "METADATA").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    assert _supported.stated_bounds() == {"python": ">=3.50,<3.99", "jax": ">=7,<8"}


def test_versions_within_bounds_are_those_that_pip_takes(rng):
    all_bounds = [PROJECT["requires-python"], *(re.sub(r"^[a-z]+", "", one) for one in PROJECT["dependencies"])]
    for bounds in all_bounds:
        assert re.fullmatch(r"(>=|<)[\d.]+(,(>=|<)[\d.]+)*", bounds), bounds
        for _ in range(100):
            version = ".".join(str(number) for number in rng.integers(0, 16, rng.integers(1, 5)))
            assert _supported.is_within(version, bounds) == SpecifierSet(bounds).contains(version), (version, bounds)
    assert _supported.is_within("0.12.1.dev20260101+abc", ">=0.10.2,<0.13")


def test_plugins_and_capabilities_are_those_of_the_documentation():
    extras = {name for name in PROJECT["optional-dependencies"] if name.startswith("cuda")}
    assert {f"jax-{extra}-{part}" for extra in extras for part in ("plugin", "pjrt")} == set(doctor.PLUGINS)
    assert f"compute capability {_supported.LEAST_CAPABILITY} and later" in (ROOT / "README.md").read_text()
    (compiled,) = re.findall(r"architectures=\((\d+) ", (ROOT / "scripts/architectures.sh").read_text())
    assert compiled == _supported.LEAST_CAPABILITY.replace(".", "")


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("80", ["8.0", "8.6", "8.9"], ["7.5", "9.0"]),
        ("86", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("90", ["9.0"], ["8.9", "10.0"]),
        ("90a", ["9.0"], ["10.0", "9.1"]),
        ("90-real", ["9.0"], ["10.0"]),
        ("90-virtual", ["9.0", "10.0", "12.0"], ["8.9"]),
        ("100f", ["10.0", "10.3"], ["9.0", "12.0"]),
        ("120", ["12.0", "12.1"], ["10.0"]),
        ("what?", ["9.0"], []),
    ],
)
def test_what_runs_where(architecture, runs, does_not):
    assert [doctor.runs_on(architecture, one) for one in runs] == [True] * len(runs)
    assert [doctor.runs_on(architecture, one) for one in does_not] == [False] * len(does_not)


def test_a_module_that_says_nothing_of_architectures_is_not_held_against_the_gpu():
    assert doctor.find_problems(dataclasses.replace(HEALTHY, architectures=None, capabilities=("12.0",))) == []


def test_the_module_that_was_found_is_shown():
    result = CliRunner(env={"COLUMNS": "200"}).invoke(application(only_doctor=True), ["doctor"])
    native = pytest.importorskip("dsv4_jax_native")
    assert native.__file__ in result.output


@pytest.mark.parametrize("error", ["RuntimeError('no luck')", "OSError(5, 'broken disk')", "ImportError('gone')"])
def test_no_traceback_whatever_the_native_module_raises(error):
    code = (
        "import sys, importlib.abc\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'dsv4_jax_native': raise {error}\n"
        "sys.meta_path.insert(0, Broken()); sys.argv = ['dsv4-jax', 'doctor']\n"
        "from dsv4_jax.tools.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert compatibility.REBUILD in result.stdout


def test_fatal_problems_come_first_and_decide_the_exit_code(monkeypatch, capsys):
    both = dataclasses.replace(with_versions(jax_cuda13_plugin="0.11.0"), cuda_built=0)
    assert [problem.fatal for problem in doctor.find_problems(both)] == [True, False]

    monkeypatch.setattr(doctor, "examine", lambda: both)
    with pytest.raises(typer.Exit) as exit_status:
        doctor.doctor()
    assert exit_status.value.exit_code == 1
    assert "DSV4_CUDA=ON" in capsys.readouterr().out

    monkeypatch.setattr(doctor, "examine", lambda: with_versions(jax_cuda13_plugin="0.11.0"))
    doctor.doctor()
    assert "Note: jax-cuda13-plugin 0.11.0" in capsys.readouterr().out


def test_doctor_on_this_machine():
    result = CliRunner().invoke(application(only_doctor=True), ["doctor"])
    assert result.exit_code == 0, result.output
    shown = result.output.replace("\n", " ")
    assert jax.__version__ in shown
    assert all(name in shown for name in TARGETS)


def test_doctor_diagnoses_a_native_module_that_does_not_load():
    code = (
        "import sys; sys.modules['dsv4_jax_native'] = None; sys.argv = ['dsv4-jax', 'doctor'];"
        "from dsv4_jax.tools.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "does not load" in result.stdout
    assert compatibility.REBUILD in result.stdout


# What nvidia-smi prints of two H100 with 18 NVLinks and two NICs between them and the network.
TWO_GPUS = """
\t\x1b[4mGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\tSYS\t0-51,104-155\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tPIX\t52-103,156-207\t1\t\tN/A
NIC0\tPIX\tSYS\t X \tSYS\t\t\t\t
NIC1\tSYS\tPIX\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""
ONE_GPU = "\t\x1b[4mGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \t0-15\t0\t\tN/A\n"
PAIRS_OVER_PCIE = """\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV4\tSYS\tSYS\t0-31\t0
GPU1\tNV4\t X \tSYS\tSYS\t0-31\t0
GPU2\tSYS\tSYS\t X \tNV4\t32-63\t1
GPU3\tSYS\tSYS\tNV4\t X \t32-63\t1
"""


@pytest.mark.parametrize(
    ("said", "lines"),
    [
        (TWO_GPUS, ["18 NVLinks (NV18): 0-1"]),
        (ONE_GPU, []),
        (
            PAIRS_OVER_PCIE,
            ["PCIe and the link between NUMA nodes (SYS): 0-2, 0-3, 1-2, 1-3", "4 NVLinks (NV4): 0-1, 2-3"],
        ),
        (PAIRS_OVER_PCIE.replace("SYS", "NV4"), ["4 NVLinks (NV4): all pairs"]),
        ("Failed to initialize NVML: Driver/library version mismatch\n", []),
        ("", []),
    ],
)
def test_what_is_between_gpus_is_shown(said, lines, monkeypatch):
    """Whatever nvidia-smi says; nothing where it is missing, fails or hangs."""
    ran = []

    def run(command, **options):
        ran.append((command, options["timeout"] > 0))
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert list(_topology.gpu_links()) == lines
    assert ran == [(["nvidia-smi", "topo", "-m"], True)]
    shown = dict(doctor._rows(dataclasses.replace(HEALTHY, links=tuple(lines))))
    assert shown.get("between GPUs", "").splitlines() == lines


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 1), PermissionError()])
def test_a_machine_that_does_not_say_has_nothing_between_gpus(error, monkeypatch):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert _topology.gpu_links() == ()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 9, TWO_GPUS, ""))
    assert _topology.gpu_links() == ()


def test_every_target_is_registered_and_again_is_harmless():
    from dsv4_jax.native import registration

    assert set(registration.REGISTERED["cpu"]) == TARGETS
    if "CUDA" in registration.REGISTERED:
        assert set(registration.REGISTERED["CUDA"]) == TARGETS
    assert registration.register() == registration.REGISTERED


@pytest.mark.parametrize(("built", "running"), [((0, 3), (0, 3)), ((0, 3), (0, 5)), ((1, 0), (1, 2))])
def test_older_headers_run_on_newer_runtimes(built, running):
    compatibility.check_ffi_api(built, running)


@pytest.mark.parametrize(("built", "running"), [((0, 4), (0, 3)), ((0, 9), (1, 0)), ((1, 0), (0, 9))])
def test_rejected_ffi_api_is_one_clear_import_error(built, running):
    with pytest.raises(ImportError) as raised:
        compatibility.check_ffi_api(built, running)
    message = str(raised.value)
    assert f"{built[0]}.{built[1]}" in message
    assert f"{running[0]}.{running[1]}" in message
    assert compatibility.REBUILD in message
