"""Damage for tests of parsers: JSON texts that are nearly right, and files whose bytes are nearly right."""

import contextlib
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

_HOLE = "@a hole@"

NUMBERS = st.one_of(
    st.integers(-3, 200),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**64, 10**30, 10**400, -1, 0.5, 1e-320, 1e308, 512.0, 128.0]),
)
TEXTS = st.one_of(
    st.text(max_size=4),
    st.sampled_from(["", "\0", "\ud800", "..", "/", "x" * 5000, "yarn", "default", "F32", "moe", "ü/é", "\u202e"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
DEPTHS = st.one_of(st.sampled_from([1, 2, 99, 200, 5_000, 200_000]), st.integers(1, 1100))
RAW = st.one_of(
    VALUES.map(json.dumps),
    VALUES.map(json.dumps),
    DEPTHS.map(lambda depth: "[" * depth + "1" + "]" * depth),
    DEPTHS.map(lambda depth: '{"a":' * depth + "1" + "}" * depth),
    DEPTHS.map(lambda depth: "[" * depth),
    st.sampled_from(["NaN", "-Infinity", "1e999", "-0", "9" * 4300, "9" * 5000, '{"a":1,"a":2}', "", "nul", "1,", "}"]),
)
"""Text where a JSON value is expected; most of it is one."""


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything in a JSON value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from _places(one, (*path, key))


@st.composite
def damaged_json(draw: Any, value: Any) -> str:
    """The text of a JSON value of which up to three parts are dropped, replaced, put deeper or stated twice."""
    value = json.loads(json.dumps(value))
    texts: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([path for path in _places(value) if path] or [("",)]))
        parent = value
        for key in way:
            parent = parent[key]
        if last == "":
            break
        what = draw(st.sampled_from(("drop", "replace", "replace", "replace", "nest", "twice")))
        old = json.dumps(parent[last])
        if what == "drop":
            del parent[last]
            continue
        parent[last] = _HOLE + str(len(texts))
        if what == "replace":
            texts.append(draw(RAW))
        elif what == "nest":
            texts.append(f"[{old}]" if draw(st.booleans()) else json.dumps({str(last): json.loads(old)}))
        else:
            again = old if draw(st.booleans()) else draw(RAW)
            texts.append(f"{old}, {json.dumps(last) + ':' if isinstance(parent, dict) else ''} {again}")
    text = json.dumps(value)
    for index in reversed(range(len(texts))):  # an older hole may lie in a newer one's text
        text = text.replace(json.dumps(_HOLE + str(index)), texts[index])
    return text


def encoded(text: str) -> bytes:
    """UTF-8, or, where there is half of a surrogate pair, what is nearly that."""
    return text.encode("utf-8", "surrogatepass")


@st.composite
def damaged_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes of which a part is cut off, put in, or changed; never the same."""
    at = draw(st.one_of(st.integers(0, len(data) - 1), st.integers(0, min(len(data) - 1, 3000))))
    match draw(st.sampled_from(("cut", "change", "change", "put", "drop", "end"))):
        case "cut":
            return data[:at]
        case "put":
            return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
        case "drop":
            return data[:at] + data[at + draw(st.integers(1, 9)) :]
        case "end":
            return data + draw(st.binary(min_size=1, max_size=9))
        case _:
            changed = draw(st.one_of(st.sampled_from([1 << bit for bit in range(8)]), st.integers(1, 255)))
            return data[:at] + bytes([data[at] ^ changed]) + data[at + 1 :]


@contextlib.contextmanager
def small_memory(given: int) -> Iterator[None]:
    """Whatever is inside may take 16 MiB, and 60 times what it was given, more than that is an error."""
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        if started:
            tracemalloc.stop()
    assert peak <= (16 << 20) + 60 * given, f"{peak:,} bytes for {given:,}"
