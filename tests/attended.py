"""Rows for attention to look at, held in a window and a pool whose unused rows are NaN, and float64 attention."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_formats

from dsv4_jax import ops
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import WINDOW_FORMATS, VectorFormat
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.ops.attend.operands import Attended
from dsv4_jax.ops.operands import Window
from dsv4_jax.spec.kinds import BLOCK_TOKENS

LAYER = 1  # of two; the other one is NaN throughout
FP32 = WINDOW_FORMATS["fp32"]


def plan_of(slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], padding: int = 0) -> StepPlan:
    """A step of requests at slots, by their first position and number of tokens, and tokens of padding."""
    layout = PlanLayout(int(sum(counts)) + padding, len(slots))
    return build_plan(layout, slots, starts, counts, False)


class Encoded(NamedTuple):
    """Rows as a format stores them: bytes of each row (or its numbers), its scales, and what they are worth."""

    data: np.ndarray
    scales: np.ndarray
    values: np.ndarray  # float64 [rows, 512]

    @classmethod
    def of(cls, rows: np.ndarray, vector_format: VectorFormat) -> "Encoded":
        """By the formats' published rules, without code of the package."""
        if not vector_format.quantized:
            data = np.asarray(rows).astype(vector_format.dtype)
            return cls(data, np.zeros((len(rows), 0), data.dtype), data.astype(np.float64))
        codec, scale = vector_format.codec, vector_format.global_scale
        coded = [numpy_formats.encode_row(row, codec, scale) for row in rows]
        values = [numpy_formats.decode_row(*one, codec, scale) for one in coded]
        return cls(*(np.stack(part) for part in zip(*coded, strict=True)), np.stack(values).astype(np.float64))

    def put(self, pages: np.ndarray, rows_per_page: int, page: np.ndarray, row: np.ndarray, which: np.ndarray) -> None:
        """Stores rows `which` at places of pages [pages, *page]."""
        if self.scales.shape[1] == 0:
            pages[page, row] = self.data[which]
            return
        data, scales = self.data.shape[1], self.scales.shape[1]
        pages[page[:, None], (row * data)[:, None] + np.arange(data)] = self.data[which]
        pages[page[:, None], (rows_per_page * data + row * scales)[:, None] + np.arange(scales)] = self.scales[which]


def poisoned(vector_format: VectorFormat, layers: int, pages: int, rows_per_page: int) -> np.ndarray:
    """A pool [layers, pages, *page] of NaN."""
    shape = (layers, pages, *vector_format.page_shape(rows_per_page))
    return np.full(shape, 255 if vector_format.quantized else np.nan, vector_format.dtype)


class HeldRows:
    """What a cache would hold of two layers: a window of every slot, and entries in blocks of a table.

    Attributes:
      window: the window and its positions, for ``LAYER``; the other layer is NaN.
      pool: entries, likewise.
      table: int32 [slots, blocks], in no order.
    """

    def __init__(self, window_format, entry_format, *, ratio: int, ring: int, slots: int, blocks: int = 9):
        self.window_format, self.entry_format, self.ratio, self.ring = window_format, entry_format, ratio, ring
        self.slots, self.per_block = slots, BLOCK_TOKENS // ratio
        self.table = np.arange(slots * blocks, dtype=np.int32)[::-1].reshape(slots, blocks)
        self.pool = poisoned(entry_format, 2, slots * blocks, self.per_block)
        self.window_values: dict[tuple[int, int], np.ndarray] = {}
        self.entry_values: dict[tuple[int, int], np.ndarray] = {}

    def put_window(self, lasts: Mapping[int, int], encoded: Encoded, which: Callable[..., np.ndarray]) -> None:
        """Fills rings with the positions up to each slot's last one; which(slots, positions) are rows of encoded."""
        held = [(slot, at) for slot, last in lasts.items() for at in range(max(0, last - self.ring + 1), last + 1)]
        slot, at = np.array(held).T
        rows, positions = which(slot, at), np.full((2, self.slots, self.ring), -1, np.int32)
        positions[LAYER, slot, at % self.ring] = at
        window = poisoned(self.window_format, 2, self.slots, self.ring)
        encoded.put(window[LAYER], self.ring, slot, at % self.ring, rows)
        self.window = Window(window, positions)
        self.window_values = {place: encoded.values[row] for place, row in zip(held, rows, strict=True)}

    def put_entries(self, held: Sequence[tuple[int, int]], encoded: Encoded, which: np.ndarray) -> None:
        """Stores entries, (slot, number) each, in their blocks."""
        slot, entry = np.array(held, int).reshape(-1, 2).T
        block = self.table[slot, entry // self.per_block]
        encoded.put(self.pool[LAYER], self.per_block, block, entry % self.per_block, which)
        self.entry_values = {place: encoded.values[row] for place, row in zip(held, which, strict=True)}

    def draw(self, rng: np.random.Generator, lasts: Mapping[int, int], entries: int = 1 << 30) -> None:
        """Rows of a few hundred random ones: logits of queries 15 times as large as normal ones vary by 1.5."""
        rows = (0.1 * rng.normal(size=(211, 512))).astype(np.float32)
        self.table = rng.permutation(self.table.ravel()).reshape(self.table.shape)

        def any_of(count: int) -> np.ndarray:
            return rng.integers(len(rows), size=count)

        self.put_window(lasts, Encoded.of(rows, self.window_format), lambda _, at: any_of(len(at)))
        held = [(s, e) for s, last in lasts.items() for e in range(min(entries, (last + 1) // self.ratio))]
        self.put_entries(held, Encoded.of(rows, self.entry_format), any_of(len(held)))

    def seen(self, slot: int, position: int, chosen: Any) -> np.ndarray:
        """What a token sees, float64 [rows, 512]: its window of 128, and of the chosen entries the visible ones."""
        window = [self.window_values[slot, at] for at in range(max(0, position - 127), position + 1)]
        visible = (position + 1) // self.ratio
        return np.stack(window + [self.entry_values[slot, int(e)] for e in chosen if 0 <= e < visible])

    def attend(self, queries, plan, indices, entries, *, layer=LAYER, **options) -> Attended:
        """Attention over chosen entries; without indices over the first ones; without either over the window alone."""
        arrays = {name: options.pop(name, None) for name in ("sinks", "rotary", "displaced")}
        if indices is None and entries is None:
            options |= {"format": self.window_format}
            attend = jax.jit(functools.partial(ops.attend_window, **options))
            return attend(self.window, queries, plan, layer, **arrays)[1]
        options |= {"ratio": self.ratio, "window_format": self.window_format, "entry_format": self.entry_format}
        held = (self.window, self.pool, self.table, queries)
        if indices is None:
            attend = jax.jit(functools.partial(ops.attend_all_entries, entries=entries, **options))
            return attend(*held, plan, layer, LAYER, **arrays)[2]
        attend = jax.jit(functools.partial(ops.attend_entries, **options))
        return attend(*held, indices, plan, layer, LAYER, **arrays)[2]


def softmax_attention(queries, rows, sinks, rotary, token) -> tuple[np.ndarray, np.ndarray]:
    """float64 output [heads, 512] and lse [heads] of one token's queries over rows."""
    logits = np.asarray(queries, np.float64) @ rows.T * 512**-0.5
    peak = logits.max(1, keepdims=True)
    weights = np.exp(logits - peak)
    total = weights.sum(1, keepdims=True)
    sunk = total if sinks is None else total + np.exp(np.asarray(sinks, np.float64)[:, None] - peak)
    output = weights @ rows / sunk
    if rotary is not None:
        cos, sin = (np.asarray(angles[token], np.float64) for angles in (rotary.cos, rotary.sin))
        x, y = output[:, 448::2].copy(), output[:, 449::2].copy()
        output[:, 448::2], output[:, 449::2] = x * cos + y * sin, y * cos - x * sin
    return output, (peak + np.log(total))[:, 0]


def assert_as_tensor_cores(got, expected, what: str) -> None:
    """Outputs [..., channels] differ by no more than what bfloat16 weights allow."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(got).all()
    wrong = np.abs(got - expected) > np.maximum(1e-3, 2.01 / 128 * np.abs(expected))
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.size} are off, {np.argwhere(wrong)[0]} first"
    assert 1 - 2 * (got * expected).sum() / ((got**2).sum() + (expected**2).sum()) <= 5e-6


def assert_both_of_tensor_cores(got, expected, what: str) -> None:
    """Outputs [..., heads, channels], each off by what bfloat16 weights allow: where large rows cancel, by as much as
    on the head's largest channel.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(got).all()
    wrong = np.abs(got - expected) > 2 * 2.01 / 128 * np.abs(expected).max(-1, keepdims=True)
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.size} are off, {np.argwhere(wrong)[0]} first"
    assert 1 - 2 * (got * expected).sum() / ((got**2).sum() + (expected**2).sum()) <= 4 * 5e-6


def assert_attended(attended: Attended, token: int, queries, rows, sinks, rotary, *, exact: bool) -> None:
    """Float32 is within 1e-5 of float64; what tensor cores multiply is within what bfloat16 weights allow."""
    output, lse = softmax_attention(queries, rows, sinks, rotary, token)
    got = np.asarray(attended.output[token], np.float64)
    if exact and attended.output.dtype == jnp.float32:
        np.testing.assert_allclose(got, output, rtol=0, atol=1e-5)
    else:
        assert_as_tensor_cores(got, output, f"token {token}")
    np.testing.assert_allclose(attended.lse[token], lse, rtol=0, atol=1e-5 if exact else 1e-3)
