"""What operations want done to the cache's arrays, until somebody takes it to the device."""

from __future__ import annotations

from collections.abc import Iterable

from dsv4_jax.layout.transfers import TransferList, Transfers

Wish = tuple[str, tuple]
"""A method of ``TransferList`` and its arguments."""


def pack(wishes: Iterable[Wish]) -> Transfers:
    """The transfers that are wished, in order, as arrays."""
    made = TransferList()
    for name, arguments in wishes:
        getattr(made, name)(*arguments)
    return made.pack()
