"""Meshes as commands take them: ``data=4,tensor=2``."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

import typer

from dsv4_jax import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dsv4_jax.deepseek_v4.config import DeepseekV4Config


class MeshSize(NamedTuple):
    """The axes of a mesh.

    Attributes:
      data: shards of the cache, each with requests of its own.
      tensor: devices that each have the whole of a shard, and split the model's heads.
    """

    data: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self)


def parse_mesh(text: str | None) -> MeshSize:
    """A mesh from ``data=N``, ``tensor=N`` or both; one device for None.

    Raises:
      typer.BadParameter: it is something else.
    """
    if text is None:
        return MeshSize()
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(data|tensor)\s*=\s*([1-9]\d{0,4})\s*", part)
        if not match or match[1] in sizes:
            raise typer.BadParameter(
                f"{text!r} is no mesh; write data=N for N shards, tensor=N for N devices to a shard, or both, as "
                "data=4,tensor=2.",
                param_hint="--mesh",
            )
        sizes[match[1]] = int(match[2])
    return MeshSize(**sizes)


def model_mesh(config: DeepseekV4Config, size: MeshSize) -> Mesh:
    """The devices to run a model on.

    Raises:
      typer.BadParameter: they are not there, or the model's heads cannot be split so.
    """
    from dsv4_jax.deepseek_v4.placement import server_mesh

    try:
        return server_mesh(config, **size._asdict())
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--mesh") from error
