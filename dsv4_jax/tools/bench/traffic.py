"""The fewest bytes an op must move: every row it needs read once, every row it makes written once. And the operations
of its matrix products.

Positions decide which rows those are. Plans, block tables, angles and a layer's weights are left out: all tokens share
them, so that they are small beside the rows and stay in the caches of the chip.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.spec.kinds import HEAD_DIM, KEY_DIM, LayerKind

FLOAT32 = 4
BFLOAT16 = 2
POSITION = 4
VALID = 1


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Who brings what in a step: request i brings `counts[i]` tokens from position `starts[i]`."""

    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def ends(self) -> NDArray[np.int64]:
        """Each request's next position after the step."""
        return self.starts + self.counts

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return int(self.counts.sum())

    def visible(self, ratio: int) -> list[NDArray[np.int64]]:
        """How many entries of `ratio` tokens each token of a request sees, for each request."""
        return [(np.arange(*ends) + 1) // ratio for ends in zip(self.starts, self.ends, strict=True)]

    def closing(self, ratio: int) -> int:
        """Windows of `ratio` tokens that close in the step."""
        return int((self.ends // ratio - self.starts // ratio).sum())


def window_rows(shape: StepShape, ring: int, format: VectorFormat, row_itemsize: int) -> int:
    """Window rows that outlive the step: read, stored, and their positions noted."""
    rows = int(np.minimum(shape.counts, ring).sum())
    return rows * (HEAD_DIM * row_itemsize + format.row_bytes + POSITION)


def tail_halves_written(shape: StepShape, ratio: int) -> int:
    """Rows (of kv or gate, one entry wide) that a step leaves in the tails for entries that close later."""
    halves = shape.ends - np.maximum(shape.starts, shape.ends // ratio * ratio)
    if ratio == LayerKind.CSA.ratio:
        halves = halves + shape.ends - np.maximum(shape.starts, (shape.ends // ratio - 1) * ratio)
    return 2 * int(halves.sum())


def tail_halves_read(shape: StepShape, ratio: int) -> int:
    """Rows of earlier steps that the entries closing in a step pool."""
    first = shape.starts // ratio
    closing = shape.ends // ratio - first
    of_open_window = shape.starts - first * ratio
    halves = np.where(closing > 0, of_open_window, 0)
    if ratio == LayerKind.CSA.ratio:
        halves = halves + np.where((closing > 0) & (first > 0), ratio, 0)
        halves = halves + np.where(closing > 1, of_open_window, 0)
    return 2 * int(halves.sum())


def projections(shape: StepShape, ratio: int, width: int, itemsize: int) -> int:
    """Every token's kv and gate, read."""
    columns = width * (2 if ratio == LayerKind.CSA.ratio else 1)
    return 2 * shape.tokens * columns * itemsize


def append_tail(shape: StepShape, ratio: int, width: int, itemsize: int) -> int:
    """What the tail must keep of kv and gate, read and written."""
    halves = tail_halves_written(shape, ratio)
    return halves * width * (itemsize + FLOAT32)


def compress(shape: StepShape, ratio: int, width: int, itemsize: int) -> int:
    """Every row that a closing entry pools read once, from the tail or from the step, and the entries written."""
    from_tail = tail_halves_read(shape, ratio)
    # What a step brings is pooled in the step unless the tail keeps it; overlap halves may be needed for both.
    first, last = shape.starts // ratio, shape.ends // ratio
    pooled = np.where(last > first, last * ratio - shape.starts, 0)
    if ratio == LayerKind.CSA.ratio:
        pooled = pooled + np.where(last > first, np.maximum((last - 1) * ratio - shape.starts, 0), 0)
    from_step = 2 * int(pooled.sum())
    return width * (from_tail * FLOAT32 + from_step * itemsize + shape.closing(ratio) * FLOAT32)


def flush(shape: StepShape, ratio: int, format: VectorFormat) -> int:
    """Closing entries read as float32 and stored."""
    return shape.closing(ratio) * (format.width * FLOAT32 + format.row_bytes)


def rotate(shape: StepShape, ratio: int, width: int) -> int:
    """Cleared rows of requests whose step closed a window: all but those the next entries pool."""
    closed = shape.ends // ratio > shape.starts // ratio
    rows, kept = ratio, shape.ends % ratio
    if ratio == LayerKind.CSA.ratio:
        rows, kept = 3 * ratio, ratio + 2 * kept
    return 2 * int(np.where(closed, rows - kept, 0).sum()) * width * FLOAT32


def compressor(shape: StepShape, ratio: int, format: VectorFormat, itemsize: int, *, hca_tail: str = "rows") -> int:
    """One compressor's part of `update`: projections read, tails read and written, entries stored.

    Of a running tail: the states of windows begun before, and of those left open.
    """
    if hca_tail == "running" and ratio == LayerKind.HCA.ratio:
        tail_rows = 3 * int((shape.starts % ratio > 0).sum() + (shape.ends % ratio > 0).sum())
    else:
        tail_rows = tail_halves_read(shape, ratio) + tail_halves_written(shape, ratio)
    return (
        projections(shape, ratio, format.width, itemsize)
        + tail_rows * format.width * FLOAT32
        + shape.closing(ratio) * format.row_bytes
    )


def gather(rows: int, format: VectorFormat, itemsize: int, *, index_bytes: int = 0) -> int:
    """Stored rows read, and written dense with position and validity; `index_bytes` are read for each row."""
    return rows * (index_bytes + format.row_bytes + format.width * itemsize + POSITION + VALID)


def quantize(rows: int, format: VectorFormat, itemsize: int) -> int:
    """Rows of one type read and of the other written; the same for `dequantize`."""
    return rows * (format.width * itemsize + format.row_bytes)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Rows that a step's tokens look at.

    Attributes:
      looks: counted for every token.
      rows: counted once for all tokens of a request.
    """

    looks: int
    rows: int


def window_seen(shape: StepShape, size: int) -> Seen:
    """Rows of the sliding window, the tokens' own included."""
    looks = sum(int(np.minimum(visible, size).sum()) for visible in shape.visible(1))
    return Seen(looks, int((shape.ends - np.maximum(shape.starts - size + 1, 0)).sum()))


def chosen_seen(shape: StepShape, ratio: int, indices: NDArray[np.int32]) -> Seen:
    """Chosen entries, those among `indices` [tokens, count] that their tokens see."""
    of_request = np.split(indices, np.cumsum(shape.counts)[:-1])
    seen = [
        chosen[(chosen >= 0) & (chosen < visible[:, None])]
        for chosen, visible in zip(of_request, shape.visible(ratio), strict=True)
    ]
    return Seen(sum(len(entries) for entries in seen), sum(len(np.unique(entries)) for entries in seen))


def all_seen(shape: StepShape, ratio: int, count: int) -> Seen:
    """All entries below `count`."""
    looks = sum(int(np.minimum(visible, count).sum()) for visible in shape.visible(ratio))
    return Seen(looks, int(np.minimum(shape.ends // ratio, count).sum()))


def attend(tokens: int, heads: int, stored: int, itemsize: int, *, indices: int = 0) -> int:
    """Stored bytes and `indices` of each token read, its queries read, its output of the same type and lse written."""
    return stored + tokens * (4 * indices + heads * (2 * HEAD_DIM * itemsize + FLOAT32))


def attend_operations(heads: int, looks: int) -> int:
    """Every row is multiplied with every head's query, and added up with its weight."""
    return 2 * 2 * HEAD_DIM * heads * looks


def index_topk(shape: StepShape, ratio: int, format: VectorFormat, heads: int, k: int, itemsize: int) -> int:
    """Keys, queries and head weights read wherever a token sees more than `k` entries; choices written."""
    keys = np.where(shape.ends // ratio > k, shape.ends // ratio, 0)
    choosing = sum(int((visible > k).sum()) for visible in shape.visible(ratio))
    asked = choosing * heads * (KEY_DIM * itemsize + FLOAT32)
    return int(keys.sum()) * format.row_bytes + asked + 4 * k * shape.tokens


def index_operations(shape: StepShape, ratio: int, format: VectorFormat, heads: int, k: int) -> int:
    """Every key that a token sees is multiplied with every head's query, unless it sees at most k; see ``Workload``."""
    looks = sum(int(visible[visible > k].sum()) for visible in shape.visible(ratio))
    return 2 * KEY_DIM * heads * looks // (2 if format.name in ("fp8", "mxfp4") else 1)
