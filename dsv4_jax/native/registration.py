"""Importing this registers the FFI handlers of dsv4_jax_native with JAX, or says in one ImportError why not."""

import jax

from dsv4_jax.native.compatibility import REBUILD, NativeModuleError, check_ffi_api, running_ffi_api_version
from dsv4_jax.native.digest import check_digest

try:
    import dsv4_jax_native
except ImportError as error:
    raise NativeModuleError(f"The native module of dsv4_jax does not load ({error}).", REBUILD) from error


def register() -> dict[str, tuple[str, ...]]:
    """Register every handler of the native module; again is harmless.

    Returns:
        The registered target names by JAX platform: "cpu", and "CUDA" if the module was built with CUDA.

    Raises:
        NativeModuleError: the installed jaxlib does not accept what the module was built against, or the module is
            another version's.
    """
    check_ffi_api(dsv4_jax_native.ffi_api_version(), running_ffi_api_version())
    check_digest(dsv4_jax_native)
    handlers = dsv4_jax_native.registrations()
    for platform, targets in handlers.items():
        for name, handler in targets.items():
            jax.ffi.register_ffi_target(name, handler, platform=platform, api_version=1)
    return {platform: tuple(targets) for platform, targets in handlers.items()}


REGISTERED = register()
