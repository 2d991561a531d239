"""The compiled module: XLA FFI handlers as capsules, and what they were built with."""

from typing_extensions import CapsuleType

def registrations() -> dict[str, dict[str, CapsuleType]]:
    """FFI handlers by target name, by JAX platform: "cpu", and "CUDA" when built with CUDA."""

def ffi_api_version() -> tuple[int, int]:
    """XLA FFI API version (major, minor) of the headers the module was built against."""

def cuda_version() -> int:
    """CUDA runtime linked in, as CUDART_VERSION (13000 = 13.0); 0 when built without CUDA."""

def cuda_architectures() -> tuple[str, ...]:
    """What the kernels were compiled for: "90" is machine code for compute capability 9.0, which newer devices of the
    same major version run too; "90-virtual" is PTX, which the driver compiles for any newer device. Empty when built
    without CUDA.
    """

def signatures() -> dict[str, tuple[str, str, str]]:
    """Op -> the names of its operands, results and attributes, in the order of the call, with a space between."""

def codecs() -> dict[tuple[str, int], tuple[int, int, int]]:
    """(codec, width) -> bytes of a row's data, of its scales, and what a page's size is a multiple of."""

def kinds() -> dict[str, tuple[int, bool, bool, bool, bool, int]]:
    """Kind of layer -> ratio, overlap, gate, position_bias, indexed, and rows of its tail."""

def plan_offsets(tokens: int, requests: int, /) -> dict[str, int]:
    """Where the kernels look for each field of a packed plan: field name -> index of its first element."""
