"""What dsv4_jax is known to work with: the bounds that pyproject.toml states, and the GPUs that its tests ran on."""

import re
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

LEAST_CAPABILITY = "8.0"
"""Compute capability that the kernels need."""

TESTED_CAPABILITIES = ("9.0",)
"""Compute capabilities that the GPU tests ran on."""


def stated_bounds() -> Mapping[str, str]:
    """The bounds of "python" and of each required package, as ">=0.10.2,<0.13".

    Those of the installed package; of the source folder where only that is on the path; empty if neither is there.
    """
    try:
        about = metadata.metadata("dsv4-jax")
        python, required = about["Requires-Python"], about.get_all("Requires-Dist") or []
    except metadata.PackageNotFoundError:
        source = Path(__file__).parents[3] / "pyproject.toml"
        if not source.exists():
            return {}
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        python, required = project["requires-python"], project["dependencies"]
    always = [re.fullmatch(r"([\w.-]+)\s*([^;\[]*)", one) for one in required]  # no extra, no marker
    stated = {"python": python, **{one[1]: one[2] for one in always if one}}
    # Metadata has an order of its own.
    return {
        name: ",".join(sorted(re.findall(r"[<>=][^\s,]+", bounds), reverse=True)) for name, bounds in stated.items()
    }


def is_within(version: str, bounds: str) -> bool:
    """Whether a version ("0.12.0.1") is within bounds, of >= and < alone. A pre-release counts as its release."""
    has = _numbers(version)
    return all(
        has >= _numbers(bound) if operator == ">=" else has < _numbers(bound)
        for operator, bound in re.findall(r"(>=|<)([\d.]+)", bounds)
    )


def _numbers(version: str) -> list[int]:
    numbers = re.findall(r"\d+", re.match(r"[\d.]*", version)[0])  # type: ignore[index]  # it matches nothing too
    return [*map(int, numbers), 0, 0, 0, 0][:5]
