"""Hold what a server computed with its cache against the same tokens computed without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dsv4_jax import CacheFormats, ModelSpec
from dsv4_jax.example.full_context import full_context
from dsv4_jax.example.serve import Served
from dsv4_jax.example.weights import StackWeights

_full_context = jax.jit(full_context, static_argnames=("spec", "formats"))


@dataclasses.dataclass
class Verification:
    """The largest differences found over all requests, and what is accepted.

    Attributes:
      logit_tolerance: the largest logit difference accepted, relative to the largest logit magnitude.
      score_tolerance: how far below the last chosen entry's score a flipped choice may lie, relative to the
        largest score magnitude that the token sees.
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
    def passed(self) -> bool:
        """Whether anything was compared and nothing is further off than accepted (NaN counts as further off)."""
        close = self.relative <= self.logit_tolerance and self.gap <= self.score_tolerance
        return self.positions > 0 and self.malformed == 0 and close


def tolerances(formats: CacheFormats) -> tuple[float, float]:
    """The logit and score differences to accept for ``formats``."""
    return 1e-4, 1e-4


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
        last = np.array([record.first + record.count - 1 for record in one.steps])
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
        columns = slice(record.column, record.column + record.count)
        selected[:, record.first : record.first + record.count] = np.asarray(record.selected)[:, columns]
    return selected
