"""The kinds of attention layers, and the geometry that every layer of a DeepSeek-V4 model shares."""

from __future__ import annotations

import enum
import math

HEAD_DIM = 512
ROPE_DIM = 64
KEY_DIM = 128


class LayerKind(enum.Enum):
    """What an attention layer caches beside its sliding window."""

    SWA = "swa"
    """Sliding-window attention: nothing else."""
    CSA = "csa"
    """Compressed sparse attention: one entry and one indexer key for 4 tokens, from overlapping windows."""
    HCA = "hca"
    """Heavily compressed attention: one entry for 128 tokens."""

    @property
    def ratio(self) -> int:
        """Tokens per entry, ``m`` in the paper: 4 (CSA), 128 (HCA), 0 (SWA, which has no entries)."""
        return _RATIOS[self]


_RATIOS = {LayerKind.SWA: 0, LayerKind.CSA: 4, LayerKind.HCA: 128}
KIND_OF_RATIO = {ratio: kind for kind, ratio in _RATIOS.items()}

RATIOS = (LayerKind.CSA.ratio, LayerKind.HCA.ratio)
BLOCK_TOKENS = math.lcm(*RATIOS)
