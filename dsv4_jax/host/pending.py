"""Pending: things that wait in order until somebody takes them, through a journal."""

from __future__ import annotations

from typing import Generic, TypeVar

from dsv4_jax.host.journal import EACH, GONE, Write

T = TypeVar("T")


class Pending(Generic[T]):
    """Things in the order in which they came. Methods that change something return the writes.

    Each thing is numbered when it is added. Numbers of an operation that came to nothing are left out.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, T] = {}  # by number
        self._number = 0
        self._latest: dict[str, tuple[T, ...]] = {"taken": ()}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def latest(self) -> tuple[T, ...]:
        """What was taken last."""
        return self._latest["taken"]

    def add(self, *things: T) -> tuple[Write, ...]:
        """Puts things at the end."""
        if not things:
            return ()
        first = self._number
        self._number = first + len(things)
        return ((self._waiting, EACH, dict(enumerate(things, first))),)

    def take(self) -> tuple[tuple[T, ...], tuple[Write, ...]]:
        """Everything that waits, in order, and the writes after which nothing does."""
        things = tuple(thing for _, thing in sorted(self._waiting.items()))
        return things, ((self._latest, "taken", things), *self.forget())

    def forget(self) -> tuple[Write, ...]:
        """The writes after which nothing waits, nor what was added by those before them."""
        return ((self._waiting, EACH, GONE),)
