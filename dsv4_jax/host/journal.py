"""Journal: changes to several arrays that happen together or not at all, whatever interrupts them."""

from __future__ import annotations

from typing import Any

Write = tuple[Any, Any, Any]
"""One change, ``container[key] = value``: an array and an index, or a dict and a key; or a dict, EACH and a dict."""

GONE: Any = object()
"""The value that a dict's key is to have no longer; with EACH, no key is to have one."""

EACH: Any = object()
"""The key that stands for all keys of the value, itself a dict: one change where there are many."""


class Journal:
    """Writes down what will change before anything does, so that an interrupted change can be finished later.

    Noting the writes is one assignment: an exception that arrives before it leaves everything as it was. One that
    arrives after it leaves the note, and ``finish`` writes all of it, again where some was written already. So a value
    must not depend on what it replaces. Whoever reads the containers calls ``finish`` first.

    Attributes:
      number: of the latest ``write``. What was read under a number still holds while that is the number.
    """

    def __init__(self) -> None:
        self.number = 0
        self._noted: tuple[Write, ...] = ()

    def write(self, writes: tuple[Write, ...]) -> None:
        """Makes these changes, all or none of them. Nothing may be noted still."""
        self.number += 1  # first: a number too high makes somebody read again, an old one would not
        self._noted = writes
        self.finish()

    def finish(self) -> None:
        """Makes the changes that an interrupted ``write`` left to be made, if it did."""
        if self._noted:
            for container, key, value in self._noted:
                if value is GONE:
                    container.clear() if key is EACH else container.pop(key, None)
                elif key is EACH:
                    container.update(value)
                else:
                    container[key] = value
            self._noted = ()
