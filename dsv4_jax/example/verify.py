"""Hold what a server computed with its cache against the same tokens computed without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from dsv4_jax import CacheFormats, ModelSpec
from dsv4_jax.example.full_context import full_context
from dsv4_jax.example.serve import Served
from dsv4_jax.example.weights import StackWeights
from dsv4_jax.layout.formats import VectorFormat

_full_context = jax.jit(full_context, static_argnames=("spec", "formats"))


@dataclasses.dataclass
class Verification:
    """The largest differences found over all requests, and what is accepted.

    Attributes:
      logit_tolerance: the largest logit difference accepted, relative to the largest logit magnitude.
      score_tolerance: how far below the last chosen entry's score a flipped choice may lie, relative to the
        largest score magnitude that the token sees.
      positions: logit vectors compared.
      difference: the largest logit difference.
      scale: the largest logit magnitude.
      chosen: entries that the indexer chose, all tokens and CSA layers together.
      flips: how many of them would not be chosen without a cache.
      gap: the most by which one of those scores lower than the last one that would, relative as above.
      malformed: tokens with a choice that no scores explain, see ``SelectionCheck``.
    """

    logit_tolerance: float
    score_tolerance: float
    positions: int = 0
    difference: float = 0.0
    scale: float = 0.0
    chosen: int = 0
    flips: int = 0
    gap: float = 0.0
    malformed: int = 0

    @property
    def relative(self) -> float:
        """The largest logit difference by the largest logit magnitude."""
        return self.difference / self.scale if self.scale else 0.0

    @property
    def flip_tolerance(self) -> int:
        """How many flipped choices are accepted."""
        return int(_FLIPS * self.chosen)

    @property
    def passed(self) -> bool:
        """Whether anything was compared and nothing is further off than accepted (NaN counts as further off)."""
        close = self.relative <= self.logit_tolerance and self.gap <= self.score_tolerance
        return self.positions > 0 and self.malformed == 0 and self.flips <= self.flip_tolerance and close


# Where the two computations may differ, by codec. Sums taken in another order give other last bits: 1e-6 of the largest
# logit, measured with fp32 storage. With rounding on top, a value that falls close to the border between two codes is
# stored as one code here and as the other there: a whole step of the format in one of 512 channels of one row, which
# then goes through the layers above. What that amounts to was measured over 66 runs with other weights, texts and
# formats: at most 6e-5 (bf16), 6e-4 (fp8, both kinds) and 1.8e-3 (nvfp4). The bounds are five times that or more. For
# comparison, one row missing from the window or from the entries moves a logit by 5e-3 to 2e-2, one row missing from
# an HCA tail by 7e-4: with fp32 storage nothing of that kind can hide.
_LOGITS = {"fp32": 1e-5, "bf16": 5e-4, "fp8": 3e-3, "fp8_ds_mla": 3e-3, "nvfp4": 1e-2, "nvfp4_static": 1e-2}
# What rounding the keys adds to a score; measured as above, at most 6e-4 (bf16), 2e-3 (fp8) and 0.13 (4-bit formats,
# where one code is up to a third of its block's largest channel).
_SCORES = {"fp32": 0.0, "bf16": 5e-3, "fp8_pow2": 2e-2, "nvfp4": 0.5, "nvfp4_static": 0.5, "mxfp4": 0.5}
# The share of choices that may flip: at most 1e-3 was measured. A choice by other scores differs in far more.
_FLIPS = 1e-2


def tolerances(formats: CacheFormats) -> tuple[float, float]:
    """The logit and score differences to accept: those of the coarsest codec that has a part in each.

    Raises:
      ValueError: nobody has measured what a format of ``formats`` amounts to.
    """
    logits = max(_of_codec(_LOGITS, formats.entry_format), _of_codec(_LOGITS, formats.window_format))
    return logits, 10 * logits + _of_codec(_SCORES, formats.key_format)


def _of_codec(table: Mapping[str, float], stored: VectorFormat) -> float:
    if stored.codec not in table:
        raise ValueError(
            f"how far {stored.name} ({stored.codec}) may move a result was never measured; known are "
            f"{', '.join(table)}. Measure it, and add it to the tables of dsv4_jax/example/verify.py."
        )
    return table[stored.codec]


def verify(
    weights: StackWeights,
    spec: ModelSpec,
    formats: CacheFormats,
    served: Sequence[Served],
    *,
    max_context: int,
    progress: Callable[[], None] | None = None,
) -> Verification:
    """Recompute every served request without a cache and compare the logits after each of its steps.

    Args:
      weights: what the server ran with.
      spec: likewise.
      formats: likewise.
      served: what it recorded.
      max_context: the server's; requests are padded to it, so that one compilation serves all.
      progress: called after each request.
    """
    result = Verification(*tolerances(formats))
    for one in served:
        tokens = np.zeros(max_context, np.int32)
        tokens[: one.total] = one.tokens
        logits, checks = _full_context(
            weights, tokens, np.int32(one.total), _selections(one, max_context), spec=spec, formats=formats
        )
        last = np.array([record.first + record.tokens - 1 for record in one.steps])
        cached = np.stack([np.asarray(record.logits)[record.row] for record in one.steps])
        expected = np.asarray(logits)[last]
        # Not max(): a NaN must stay, whatever is compared with it.
        result.difference = float(np.maximum(result.difference, np.abs(cached - expected).max()))
        result.scale = max(result.scale, float(np.abs(expected).max()))
        result.gap = float(np.maximum(result.gap, np.max(checks.gap, initial=0.0)))
        result.positions += len(last)
        result.chosen += int(np.sum(checks.chosen))
        result.flips += int(np.sum(checks.flips))
        result.malformed += int(np.sum(checks.malformed))
        if progress:
            progress()
    return result


def _selections(one: Served, max_context: int) -> np.ndarray:
    """int32 [CSA layers, max_context, K]: what each token of the request attended to; -1 after its end."""
    layers, _, width = one.steps[0].selected.shape
    selected = np.full((layers, max_context, width), -1, np.int32)
    for record in one.steps:
        columns = slice(record.column, record.column + record.tokens)
        selected[:, record.first : record.first + record.tokens] = np.asarray(record.selected)[:, columns]
    return selected
