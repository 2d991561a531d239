"""`dsv4-jax doctor`: what is installed, what JAX sees, and for each problem the command that mends it.

Commands that build are for the source folder of dsv4-jax.
"""

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from dsv4_jax.native import compatibility
from dsv4_jax.tools.cli._topology import gpu_links

PACKAGES = ("dsv4-jax", "jax", "jaxlib", "numpy")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")


@dataclass(frozen=True)
class Problem:
    """Something wrong, the command that mends it, and whether the package works without mending it."""

    text: str
    command: str
    fatal: bool


@dataclass(frozen=True)
class Facts:
    """What `examine` found. Versions are strings, None where a package is not installed.

    Attributes:
        devices: JAX's devices, "platform: kind"; empty if JAX could not start.
        platforms: the platforms of those devices ("cpu", "gpu").
        jax_error: why JAX could not start, or None.
        gpu_present: the machine has an NVIDIA driver with a device, whether JAX uses it or not.
        driver_cuda: newest CUDA runtime the driver runs, as CUDART_VERSION (13000 = 13.0); None without a driver.
        native_problem: why the native module cannot be used, with the mending command, or None.
        ffi_built, ffi_running: XLA FFI API versions (major, minor) of the module and of jaxlib; None if unknown.
        cuda_built: CUDA runtime inside the native module, as CUDART_VERSION; 0 if built without CUDA; None if unknown.
        native_file: the native module that Python finds; None if there is none.
        architectures: what its kernels were compiled for: "90" and "90a" are machine code, "90-virtual" is PTX; None if
            unknown.
        capabilities: compute capability of each GPU that JAX uses, as "9.0".
        links: what lies between the machine's GPUs, by their numbers in nvidia-smi; empty if there are not several, or
            it is not known.
        targets: names of the registered FFI targets by platform.
        jax_platforms: the environment variable JAX_PLATFORMS, empty if unset.
    """

    versions: Mapping[str, str | None]
    devices: tuple[str, ...] = ()
    platforms: frozenset[str] = frozenset()
    jax_error: str | None = None
    gpu_present: bool = False
    driver_cuda: int | None = None
    native_problem: tuple[str, str] | None = None
    ffi_built: tuple[int, int] | None = None
    ffi_running: tuple[int, int] | None = None
    cuda_built: int | None = None
    native_file: str | None = None
    architectures: tuple[str, ...] | None = None
    capabilities: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    jax_platforms: str = ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver_cuda() -> int | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def examine() -> Facts:
    """Look at this Python, JAX and machine. Never raises on what it finds."""
    found: dict[str, Any] = {
        "versions": {package: _version(package) for package in PACKAGES + PLUGINS},
        "gpu_present": Path("/dev/nvidiactl").exists(),
        "driver_cuda": _driver_cuda(),
        "links": gpu_links(),
        "jax_platforms": os.environ.get("JAX_PLATFORMS", ""),
    }
    try:
        import jax

        devices = jax.devices()
        if devices[0].platform != "cpu":
            devices = devices + jax.devices("cpu")
        found["devices"] = tuple(_device(device) for device in devices)
        found["platforms"] = frozenset(device.platform for device in devices)
        gpus = [device for device in devices if device.platform == "gpu"]
        found["capabilities"] = tuple(str(getattr(device, "compute_capability", "")) for device in gpus)
        found["ffi_running"] = compatibility.running_ffi_api_version()
    except Exception as error:  # whatever keeps JAX from starting is the finding
        found["jax_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return Facts(**found)
    try:
        import dsv4_jax_native

        found["native_file"] = dsv4_jax_native.__file__
        found["ffi_built"] = dsv4_jax_native.ffi_api_version()
        found["cuda_built"] = dsv4_jax_native.cuda_version()
        found["architectures"] = tuple(dsv4_jax_native.cuda_architectures())
    except Exception:  # importing the registration below says why, and what to do
        pass
    try:
        from dsv4_jax.native.registration import REGISTERED

        found["targets"] = REGISTERED
    except compatibility.NativeModuleError as error:
        found["native_problem"] = (error.problem, error.command)
    except Exception as error:  # whatever keeps the handlers from being registered is the finding
        text = f"The native module of dsv4_jax cannot be used ({type(error).__name__}: {error})".splitlines()[0]
        found["native_problem"] = (f"{text}.", compatibility.REBUILD)
    return Facts(**found)


def _device(device: Any) -> str:
    capability = getattr(device, "compute_capability", None)
    return f"{device.platform}: {device.device_kind}" + (f", compute capability {capability}" if capability else "")


def runs_on(architecture: str, capability: str) -> bool:
    """Whether a GPU of that compute capability ("9.0") runs kernels compiled for that architecture.

    Machine code ("90") runs where the first number is the same and the second no smaller, with a suffix ("90a") only
    where both are the same; PTX ("90-virtual") where the capability is no smaller.
    """
    found = re.fullmatch(r"(\d+)(\d)([a-z]?)(-virtual|-real)?", architecture)
    wanted = re.fullmatch(r"(\d+)\.(\d+)", capability)
    if not found or not wanted:
        return True  # nothing is known, so nothing is wrong
    built, has = (int(found[1]), int(found[2])), (int(wanted[1]), int(wanted[2]))
    if found[3] == "a":
        return built == has
    if found[3] or found[4] != "-virtual":
        return built[0] == has[0] and built <= has
    return built <= has


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def find_problems(facts: Facts) -> list[Problem]:
    """What is wrong with `facts`, worst first."""
    problems = []
    jax_version = facts.versions["jax"]
    if facts.jax_error is not None:
        same = f"=={jax_version}" if jax_version else ""
        problems.append(
            Problem(f"JAX does not start ({facts.jax_error}).", f"pip install --upgrade jax{same} jaxlib{same}", True)
        )
    if facts.native_problem is not None:
        problems.append(Problem(*facts.native_problem, fatal=True))

    # The plugin's major CUDA version may not be newer than the driver's.
    extra = "cuda12" if facts.driver_cuda is not None and facts.driver_cuda < 13000 else "cuda13"
    install_plugin = f'pip install "jax[{extra}]=={jax_version}"'
    for plugin in PLUGINS:
        version = facts.versions[plugin]
        if version is not None and version != facts.versions["jaxlib"]:
            text = f"{plugin} {version} stands beside jaxlib {facts.versions['jaxlib']}."
            problems.append(Problem(text, f'pip install "jax[{plugin.split("-")[1]}]=={jax_version}"', False))

    uses_gpu = "gpu" in facts.platforms
    if facts.gpu_present and facts.jax_error is None and not uses_gpu:
        if "cpu" in facts.jax_platforms:
            text = f"There is a GPU, and JAX_PLATFORMS={facts.jax_platforms} keeps JAX from using it."
            problems.append(Problem(text, "unset JAX_PLATFORMS", False))
        else:
            problems.append(Problem("There is a GPU, and JAX does not use it.", install_plugin, False))
    if uses_gpu and facts.cuda_built == 0:
        text = "JAX uses a GPU, and dsv4_jax was built without CUDA: its operations have no GPU implementation."
        problems.append(
            Problem(text, f"pip install --no-deps -r scripts/nvcc.txt && DSV4_CUDA=ON {compatibility.REBUILD}", True)
        )
    if uses_gpu and facts.cuda_built and facts.driver_cuda and facts.cuda_built // 1000 > facts.driver_cuda // 1000:
        text = (
            f"dsv4_jax was built with CUDA {_cuda(facts.cuda_built)}, and the driver runs up to CUDA "
            f"{_cuda(facts.driver_cuda)}: update the driver, or build with an older nvcc."
        )
        problems.append(Problem(text, f"CUDACXX=/path/to/older/nvcc {compatibility.REBUILD}", True))
    problems += _unsupported_gpus(facts)
    return sorted(problems, key=lambda problem: not problem.fatal)


def _unsupported_gpus(facts: Facts) -> list[Problem]:
    """GPUs that JAX uses and the native module has no kernels for."""
    if not facts.cuda_built or not facts.architectures:
        return []
    unsupported = {one for one in facts.capabilities if not any(runs_on(built, one) for built in facts.architectures)}
    return [
        Problem(
            f"dsv4_jax was built for {', '.join(facts.architectures)}, and JAX uses a GPU of compute capability {one}: "
            "none of its operations runs there.",
            f"CUDAARCHS={one.replace('.', '')} DSV4_CUDA=ON {compatibility.REBUILD}",
            True,
        )
        for one in sorted(unsupported)
    ]


def _pair(version: tuple[int, int] | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"


def _rows(facts: Facts) -> list[tuple[str, str]]:
    rows = [("python", ".".join(map(str, sys.version_info[:3])))]
    rows += [(package, facts.versions[package] or "not installed") for package in PACKAGES]
    rows += [(plugin, version) for plugin in PLUGINS if (version := facts.versions[plugin])]
    rows.append(("devices", "\n".join(facts.devices) or "none"))
    if facts.links:
        rows.append(("between GPUs", "\n".join(facts.links)))
    rows.append(("driver", f"up to CUDA {_cuda(facts.driver_cuda)}" if facts.driver_cuda else "none"))
    built = f"CUDA {_cuda(facts.cuda_built)}" if facts.cuda_built else "built without CUDA"
    built = "unknown" if facts.cuda_built is None else built
    if facts.cuda_built and facts.architectures:
        built += f" for {', '.join(facts.architectures)}"
    if facts.native_problem is not None:
        built += "; it does not fit" if facts.native_file else ""
    rows.append(("dsv4_jax", str(Path(compatibility.__file__).parents[1])))
    rows.append(("native module", facts.native_file or "none found"))
    rows.append(("built", built))
    rows.append(("XLA FFI API", f"built against {_pair(facts.ffi_built)}, running {_pair(facts.ffi_running)}"))
    rows += [
        (f"FFI targets, {platform}", f"{len(names)}: {', '.join(names)}") for platform, names in facts.targets.items()
    ]
    return rows


def doctor() -> None:
    """Show versions, devices and FFI targets, and for each problem the command that mends it."""
    facts = examine()
    problems = find_problems(facts)
    console = Console()

    table = Table(title="dsv4-jax", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, value)
    console.print(table, highlight=False)

    if not problems:
        console.print("No problems found.")
    for problem in problems:
        label, style = ("Problem", "red") if problem.fatal else ("Note", "yellow")
        console.print(f"{label}: {problem.text}", style=style, markup=False, highlight=False)
        console.print(f"  {problem.command}", markup=False, soft_wrap=True, highlight=False)
    if any(problem.fatal for problem in problems):
        raise typer.Exit(1)
