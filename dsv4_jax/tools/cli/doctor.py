"""`dsv4-jax doctor`: what is installed, what JAX sees, and for each problem the command that mends it.

Commands that build are for the source folder of dsv4-jax.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from dsv4_jax.native import compatibility

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
    found: dict = {
        "versions": {package: _version(package) for package in PACKAGES + PLUGINS},
        "gpu_present": Path("/dev/nvidiactl").exists(),
        "driver_cuda": _driver_cuda(),
        "jax_platforms": os.environ.get("JAX_PLATFORMS", ""),
    }
    try:
        import jax

        devices = jax.devices()
        if devices[0].platform != "cpu":
            devices = devices + jax.devices("cpu")
        found["devices"] = tuple(f"{device.platform}: {device.device_kind}" for device in devices)
        found["platforms"] = frozenset(device.platform for device in devices)
        found["ffi_running"] = compatibility.running_ffi_api_version()
    except Exception as error:  # whatever keeps JAX from starting is the finding
        found["jax_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return Facts(**found)
    try:
        import dsv4_jax_native

        found["ffi_built"] = dsv4_jax_native.ffi_api_version()
        found["cuda_built"] = dsv4_jax_native.cuda_version()
    except ImportError:
        pass  # importing the registration below says why, and what to do
    try:
        from dsv4_jax.native.registration import REGISTERED

        found["targets"] = REGISTERED
    except compatibility.NativeModuleError as error:
        found["native_problem"] = (error.problem, error.command)
    return Facts(**found)


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
    return sorted(problems, key=lambda problem: not problem.fatal)


def _pair(version: tuple[int, int] | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"


def _rows(facts: Facts) -> list[tuple[str, str]]:
    rows = [("python", ".".join(map(str, sys.version_info[:3])))]
    rows += [(package, facts.versions[package] or "not installed") for package in PACKAGES]
    rows += [(plugin, version) for plugin in PLUGINS if (version := facts.versions[plugin])]
    rows.append(("devices", "\n".join(facts.devices) or "none"))
    rows.append(("driver", f"up to CUDA {_cuda(facts.driver_cuda)}" if facts.driver_cuda else "none"))
    built = {None: "unknown", 0: "built without CUDA"}.get(facts.cuda_built) or f"CUDA {_cuda(facts.cuda_built)}"
    rows.append(("native module", built))
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
    for name, value in _rows(facts):
        table.add_row(name, value)
    console.print(table)

    if not problems:
        console.print("No problems found.")
    for problem in problems:
        label, style = ("Problem", "red") if problem.fatal else ("Note", "yellow")
        console.print(f"{label}: {problem.text}", style=style, markup=False, highlight=False)
        console.print(f"  {problem.command}", markup=False, soft_wrap=True, highlight=False)
    if any(problem.fatal for problem in problems):
        raise typer.Exit(1)
