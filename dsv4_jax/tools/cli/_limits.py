"""What a device can hold: commands refuse what cannot fit before they allocate anything."""

from __future__ import annotations

import os

import jax
import typer

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
