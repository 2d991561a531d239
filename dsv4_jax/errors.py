"""``Picklable``: what every exception of the package is, so that it passes between processes as it was raised."""

from __future__ import annotations

from typing import Any


class Picklable(Exception):
    """An exception that pickles and copies whatever its ``__init__`` takes: it is made again from the same arguments.

    Python makes an exception again from ``args``, which is the finished message; an ``__init__`` that takes the parts
    of the message fails on it.
    """

    _made_of: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **keywords: Any) -> Picklable:
        """Remembers what the exception is made of."""
        error = super().__new__(cls, *args)
        error._made_of = args, keywords
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (type(self), *self._made_of), vars(self)


def _make(kind: type[Picklable], args: tuple[Any, ...], keywords: dict[str, Any]) -> Picklable:
    return kind(*args, **keywords)
