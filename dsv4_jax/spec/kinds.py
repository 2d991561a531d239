"""The kinds of attention layers as data: one row of ``Compression`` each, from which all that differs derives.

``ffi/layout/kinds.h`` holds the same rows for the kernels.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from types import MappingProxyType

HEAD_DIM = 512
ROPE_DIM = 64
KEY_DIM = 128


@dataclasses.dataclass(frozen=True)
class Compression:
    """How a layer compresses its context: one entry for every window of ``ratio`` tokens.

    Attributes:
      ratio: tokens per entry, ``m`` in the paper.
      overlap: whether an entry pools the window before its own too. A token then brings two halves: the *overlap* half,
        pooled by the next window's entry, and the *current* half, pooled by its own window's.
      gate: whether tokens are weighted by a softmax over gates.
      position_bias: whether a bias is added to the gate by the token's place in its window.
      indexed: whether there is an indexer key beside every entry, made by a compressor of its own.
    """

    ratio: int
    overlap: bool = False
    gate: bool = True
    position_bias: bool = True
    indexed: bool = False

    @property
    def pooled_rows(self) -> int:
        """Tokens whose rows one entry pools: its window, and with overlap the one before it."""
        return 2 * self.ratio if self.overlap else self.ratio

    def columns(self, width: int) -> int:
        """Columns of a token's projection for entries of ``width`` channels; with overlap, the overlap half first."""
        return 2 * width if self.overlap else width


class LayerKind(enum.Enum):
    """What an attention layer caches beside its sliding window."""

    SWA = "swa"
    """Sliding-window attention: nothing else."""
    CSA = "csa"
    """Compressed sparse attention: one entry and one indexer key for 4 tokens, from overlapping windows."""
    HCA = "hca"
    """Heavily compressed attention: one entry for 128 tokens."""

    @property
    def compression(self) -> Compression | None:
        """How its layers compress their context; None for SWA, which keeps no more of it than the window."""
        return COMPRESSIONS.get(self.value)

    @property
    def ratio(self) -> int:
        """Tokens per entry: 4 (CSA), 128 (HCA), 0 (SWA, which has no entries)."""
        return self.compression.ratio if self.compression else 0


COMPRESSIONS: Mapping[str, Compression] = MappingProxyType(
    {
        "csa": Compression(ratio=4, overlap=True, indexed=True),
        "hca": Compression(ratio=128),
    }
)
"""The table: every kind that compresses, by the value of its ``LayerKind``. No two have the same ratio."""

KIND_OF_RATIO: Mapping[int, LayerKind] = MappingProxyType({kind.ratio: kind for kind in LayerKind})

RATIOS = tuple(compression.ratio for compression in COMPRESSIONS.values())
BLOCK_TOKENS = math.lcm(*RATIOS)


def entries_per_block(ratio: int) -> int:
    """Entries (and keys) of a block of 128 tokens: 32 (CSA), 1 (HCA), 0 (SWA, ratio 0)."""
    return BLOCK_TOKENS // ratio if ratio else 0


def compression_of_ratio(ratio: int) -> Compression:
    """The row of the table with this ratio.

    Raises:
      ValueError: there is none.
    """
    for compression in COMPRESSIONS.values():
        if compression.ratio == ratio:
            return compression
    kinds = " or ".join(f"{compression.ratio} ({name.upper()})" for name, compression in COMPRESSIONS.items())
    raise ValueError(f"ratio is {ratio!r}, expected {kinds}")
