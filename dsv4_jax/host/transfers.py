"""TransferQueue: what operations want done to the cache's arrays, until somebody takes it to the device."""

from __future__ import annotations

from dsv4_jax.host.journal import GONE, Write
from dsv4_jax.layout.transfers import TransferList

Wish = tuple[str, tuple]
"""A method of ``TransferList`` and its arguments."""


class TransferQueue:
    """Transfers in the order in which they were wanted. Methods that change something return the writes."""

    def __init__(self) -> None:
        self._waiting: dict[int, Wish] = {}  # by number
        self._counts = {"number": 0}
        self._latest: dict[str, TransferList] = {"taken": TransferList()}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def latest(self) -> TransferList:
        """What was taken last."""
        return self._latest["taken"]

    def add(self, *wishes: Wish) -> tuple[Write, ...]:
        """Puts operations at the end."""
        number = self._counts["number"]
        numbered = ((self._waiting, number + index, wish) for index, wish in enumerate(wishes))
        return *numbered, (self._counts, "number", number + len(wishes))

    def take(self) -> tuple[TransferList, tuple[Write, ...]]:
        """Everything that waits, in order, and the writes after which nothing does."""
        made = TransferList()
        for _, (name, arguments) in sorted(self._waiting.items()):
            getattr(made, name)(*arguments)
        return made, ((self._latest, "taken", made), *self.forget())

    def forget(self) -> tuple[Write, ...]:
        """The writes after which nothing waits."""
        return tuple((self._waiting, number, GONE) for number in self._waiting)
