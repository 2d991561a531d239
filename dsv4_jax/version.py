"""The package's version. It is defined in pyproject.toml alone; here is what was installed of it."""

from importlib import metadata


def installed_version() -> str | None:
    """The installed package's version; None where only its source folder is on the path."""
    try:
        return metadata.version("dsv4-jax")
    except metadata.PackageNotFoundError:
        return None


__version__ = installed_version() or "0+unknown"
