"""What a device can hold: commands refuse what cannot fit before they allocate anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import typer

from dsv4_jax import CacheFormats
from dsv4_jax.layout.schema import SchemaError
from dsv4_jax.tools.cli._mesh import MeshSize

if TYPE_CHECKING:
    from dsv4_jax.deepseek_v4.config import DeepseekV4Config

LONGEST_CONTEXT = 2**20
"""Tokens of a request that any of the models takes."""
MOST_REQUESTS = 2**16
"""Requests or slots that a command takes; more than any device holds."""
MOST_DRAFTS = 64
"""Guesses of a request in a step; few texts are guessed so far ahead, and every wrong guess is computed."""


def device_memory() -> int | None:
    """Bytes that the first device has for arrays (on a CPU: the machine's memory); None if it does not tell."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None
    return (device.memory_stats() or {}).get("bytes_limit")


def require_memory(needed: int, what: str, advice: str) -> None:
    """Refuses what takes more memory than the device has.

    Args:
      needed: bytes.
      what: takes them, as the beginning of a sentence.
      advice: what to do.

    Raises:
      typer.BadParameter: it does not fit.
    """
    memory = device_memory()
    if memory is not None and needed > memory:
        device = jax.devices()[0].device_kind
        raise typer.BadParameter(f"{what} {needed:,} bytes; {device} has {memory:,}. {advice}")


def require_room_to_serve(
    config: DeepseekV4Config,
    formats: CacheFormats,
    checkpoint: Path | None,
    *,
    requests: int,
    slots: int,
    longest: int,
    check: bool,
    size: MeshSize,
    extras: dict[str, Any],
) -> None:
    """Refuses what a device, or the model, has no room for.

    Args:
      config: of the model.
      formats: of its cache.
      checkpoint: the weights' folder, if it is not the small random one.
      requests: how many there are.
      slots: of them at once, on each device.
      longest: tokens of a request.
      check: whether all is recomputed without a cache.
      size: of the mesh.
      extras: further options of ``server_schema``.

    Raises:
      typer.BadParameter: something does not fit.
    """
    from dsv4_jax.deepseek_v4.serve import server_schema

    try:
        schema = server_schema(config.spec, formats, slots=slots, max_context=longest, **extras)
    except SchemaError as error:
        raise typer.BadParameter(f"prompt and --new-tokens make {longest:,} tokens: {error}") from error
    # CPU devices have one memory between them.
    here = size.devices if jax.default_backend() == "cpu" else 1
    fewer = "Fewer --slots, --prompt-tokens or --new-tokens take less."
    require_memory(here * schema.memory_bytes, f"A cache of {slots:,} slots of {longest:,} tokens takes", fewer)
    if checkpoint is not None:
        weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        weights //= size.tensor  # at least; what is not split lies on every device
        require_memory(here * (weights + schema.memory_bytes), f"{checkpoint} and the cache take", fewer)
    if check:
        # Every head's scores of queries by keys in float32, before and after the softmax.
        scores = 2 * 4 * config.spec.num_heads * schema.max_context**2
        require_memory(scores, f"--verify of {longest:,} tokens, which compares all with all, takes", fewer)
    require_memory(8 * requests * longest, f"The text of {requests:,} requests takes", "Fewer --requests take less.")
