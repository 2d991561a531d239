"""Does the native module fit the JAX it runs under? The XLA FFI API version decides."""

import re
from pathlib import Path

from dsv4_jax.errors import Picklable

# For the source folder. Builds in isolation, against the oldest supported headers, whatever JAX is installed beside it.
REBUILD = "pip install --force-reinstall --no-deps ."


class NativeModuleError(Picklable, ImportError):
    """The native module is missing, does not load, or does not fit this JAX.

    Attributes:
        problem: what is wrong, one sentence.
        command: the command that mends it, in the source folder of dsv4-jax.
    """

    def __init__(self, problem: str, command: str):
        super().__init__(
            f"{problem} Mend it, in the source folder of dsv4-jax, with: {command}", name="dsv4_jax_native"
        )
        self.problem = problem
        self.command = command


def running_ffi_api_version() -> tuple[int, int]:
    """XLA FFI API version (major, minor) of the installed jaxlib, from the headers it carries."""
    import jaxlib

    header = (Path(jaxlib.__file__).parent / "include/xla/ffi/api/c_api.h").read_text()
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])


def check_ffi_api(built: tuple[int, int], running: tuple[int, int]) -> None:
    """Check that a runtime of version `running` accepts handlers built against version `built`.

    Raises:
        NativeModuleError: the major versions differ, or the module was built against newer headers.
    """
    if built[0] != running[0] or built[1] > running[1]:
        raise NativeModuleError(
            f"dsv4_jax was built against XLA FFI API {built[0]}.{built[1]}; "
            f"the installed jaxlib runs {running[0]}.{running[1]} and rejects it.",
            REBUILD,
        )
