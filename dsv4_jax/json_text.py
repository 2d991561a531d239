"""``parse_json``: a JSON text that somebody else wrote, or one error, whatever it holds; and what counts as a size."""

from __future__ import annotations

import json
import sys
from typing import Any

DEEPEST = 64
"""Levels of nesting that are read. Nothing here needs more than six, and Python's own recursion ends near 1000."""

LARGEST_COUNT = 2**31 - 1
"""Sizes and ids are int32."""


def parse_json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text, in which no name occurs twice in one object: which of the two counts, nobody can know.

    As Python has it, NaN and Infinity are numbers.

    Raises:
      ValueError: it is no JSON, no UTF-8, nested deeper than 64 levels, has a name twice, or text that is not Unicode.
    """
    if not isinstance(text, str):
        text = bytes(text).decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    _check(value, escapes="\\u" in text)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:80]!r} occurs twice in one object")
            seen.add(name)
    return names


def _check(value: Any, *, escapes: bool) -> None:
    """Depth, without recursion; and text, which only escapes can make something else than Unicode."""
    level = [value]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.values()
                if escapes:
                    below += one  # the names
            elif isinstance(one, list):
                below += one
            elif escapes and isinstance(one, str):
                try:
                    one.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"the text {one[:80]!r} has half of a surrogate pair") from error
        level = below
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def is_count(value: Any) -> bool:
    """Whether it is an int from 1 to ``LARGEST_COUNT``."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT


def is_number(value: Any) -> bool:
    """Whether it is a finite float, or an int that one can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
