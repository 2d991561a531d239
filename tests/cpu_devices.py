"""Processes that have several CPU devices."""

import os


def environment_of(devices: int) -> dict[str, str]:
    """This process's environment, for one with that many CPU devices; the flags that XLA has here stay."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
