"""Hold what a server computed with its cache against the same tokens computed without one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import CacheFormats
from dsv4_jax.deepseek_v4.full_context import ChoiceCheck, full_context
from dsv4_jax.deepseek_v4.model import Choices
from dsv4_jax.deepseek_v4.placement import on_one_device
from dsv4_jax.deepseek_v4.serve import Served, Server

_full_context = jax.jit(full_context, static_argnames=("config", "formats", "dtype"))


@dataclasses.dataclass
class Chosen:
    """Choices of one kind (entries, or experts), all tokens and layers together, and what is accepted.

    Attributes:
      score_tolerance: how far below the last chosen one's score a flipped choice may lie, relative to the largest
        score magnitude that the token sees.
      flip_share: what share of choices may flip, beside a few.
      chosen: how many there were.
      flips: how many of them would not have been made without a cache.
      gap: the most by which one of those scores lower than the last one that would, relative as above.
      malformed: tokens with a choice that no scores explain, see ``ChoiceCheck``.
    """

    score_tolerance: float
    flip_share: float
    chosen: int = 0
    flips: int = 0
    gap: float = 0.0
    malformed: int = 0

    @property
    def flip_tolerance(self) -> int:
        """How many flipped choices are accepted."""
        return _ODD_FLIPS + int(self.flip_share * self.chosen)

    @property
    def passed(self) -> bool:
        """Whether nothing is further off than accepted (NaN counts as further off)."""
        return self.malformed == 0 and self.flips <= self.flip_tolerance and self.gap <= self.score_tolerance

    def add(self, check: ChoiceCheck) -> None:
        """Takes in what was found of one request."""
        self.chosen += int(np.sum(check.chosen))
        self.flips += int(np.sum(check.flips))
        # Not max(): a NaN must stay, whatever is compared with it.
        self.gap = float(np.maximum(self.gap, np.max(check.gap, initial=0.0)))
        self.malformed += int(np.sum(check.malformed))


@dataclasses.dataclass
class Verification:
    """The largest differences found over all requests, and what is accepted.

    Attributes:
      logit_tolerance: the largest logit difference accepted, relative to the largest logit magnitude.
      entries: what the indexer chose.
      experts: what the routing chose.
      positions: logit vectors compared.
      difference: the largest logit difference.
      scale: the largest logit magnitude.
    """

    logit_tolerance: float
    entries: Chosen
    experts: Chosen
    positions: int = 0
    difference: float = 0.0
    scale: float = 0.0

    @property
    def relative(self) -> float:
        """The largest logit difference by the largest logit magnitude."""
        if not self.scale:
            return math.inf if self.difference else 0.0
        return self.difference / self.scale

    @property
    def passed(self) -> bool:
        """Whether anything was compared and nothing is further off than accepted (NaN counts as further off)."""
        close = self.relative <= self.logit_tolerance
        return self.positions > 0 and close and self.entries.passed and self.experts.passed


# Where the two computations may differ, by format. Sums taken in another order give other last bits: 1.3e-6 of the
# largest logit, measured with fp32 storage. With rounding on top, a value that falls close to the border between two
# codes is stored as one code here and as the other there: a whole step of the format in one of 512 channels of one row,
# or in 16 of them where it is the code of a scale, which then goes through the layers above. What that amounts to was
# measured over 124 runs of the random checkpoint with other seeds, texts and formats: at most 1.6e-4 (bf16), 1.6e-3
# (fp8, both kinds) and 7e-3 (nvfp4, both kinds). The bounds are five times that or more. For comparison, one row
# missing from the window or one entry moves a logit by 2e-2, one row missing from a CSA tail by 2e-3, from an HCA tail
# by 5e-4: with fp32 storage nothing of that kind can hide.
_LOGITS = {"fp32": 1e-5, "bf16": 1e-3, "fp8": 8e-3, "fp8_ds_mla": 8e-3, "nvfp4": 4e-2, "nvfp4_static": 4e-2}
# Of activations, measured likewise: at most 2.4e-2 with bfloat16, whose last bit is up to 8e-3 of a number. So a run in
# float32 is the sharper test of the cache.
_ACTIVATIONS = {"float32": 0.0, "bfloat16": 0.12}
# What rounding the keys adds to a score of the indexer, and with quantized keys rounding the queries, which
# ``index_topk`` does: at most 4e-3 (bf16), 0.08 (fp8 and mxfp4) and 0.05 (nvfp4, both kinds).
_SCORES = {"fp32": 0.0, "bf16": 2e-2, "fp8": 0.4, "nvfp4": 0.3, "nvfp4_static": 0.3, "mxfp4": 0.4}
# The share of choices of entries that may flip: at most 1.3e-2 did with fp8 and mxfp4 keys, whose queries are rounded
# to E4M3, and 2.8e-3 with all others, bfloat16 activations included. A choice by other scores differs in far more.
_FLIPS = {"fp32": 1.5e-2, "bf16": 1.5e-2, "fp8": 7e-2, "nvfp4": 1.5e-2, "nvfp4_static": 1.5e-2, "mxfp4": 7e-2}
# Of experts: at most 5e-3 did, and scored lower by at most what logits may differ.
_EXPERT_FLIPS = 2.5e-2
# Where there are so few choices that a share of them is less than one.
_ODD_FLIPS = 3


def tolerances(formats: CacheFormats, dtype: Any = jnp.float32) -> Verification:
    """Nothing found yet, and the differences to accept: those of the coarsest rounding that has a part in each.

    Raises:
      ValueError: nobody has measured what a format of ``formats``, or ``dtype``, amounts to.
    """
    logits = max(
        _measured(_LOGITS, formats.entries),
        _measured(_LOGITS, formats.window),
        _measured(_ACTIVATIONS, jnp.dtype(dtype).name),
    )
    entries = Chosen(2 * logits + _measured(_SCORES, formats.keys), _measured(_FLIPS, formats.keys))
    return Verification(logits, entries, Chosen(logits, _EXPERT_FLIPS))


def _measured(table: Mapping[str, float], name: str) -> float:
    if name not in table:
        raise ValueError(
            f"how far {name} may move a result was never measured; known are {', '.join(table)}. Measure it, and add "
            "it to the tables of dsv4_jax/deepseek_v4/verify.py."
        )
    return table[name]


def verify(
    server: Server, served: Sequence[Served], *, weights: Any = None, progress: Callable[[], None] | None = None
) -> Verification:
    """Recompute every served request without a cache and compare all logits that a token was chosen by.

    Those are the logits after each of a request's steps, and after each of its drafts that were kept.

    Args:
      server: one that recorded.
      served: what it served.
      weights: to recompute with, instead of the server's.
      progress: called after each request.
    """
    schema, weights = server.schema, on_one_device(server.weights if weights is None else weights)
    result = tolerances(schema.formats, server.dtype)
    # Padded to the same lengths, so that one compilation serves all.
    most = max((sum(record.judged for record in one.steps) for one in served), default=0)
    for one in served:
        tokens, wanted = np.zeros(schema.max_context, np.int32), np.zeros(most, np.int32)
        tokens[: one.done] = one.tokens[: one.done]
        ends = [record.first + record.tokens for record in one.steps]
        places = [np.arange(end - record.judged, end) for end, record in zip(ends, one.steps, strict=True)]
        compared = sum(record.judged for record in one.steps)
        wanted[:compared] = np.concatenate(places)
        options: dict[str, Any] = {"config": server.config, "formats": schema.formats, "dtype": server.dtype}
        recorded = _recorded(one, schema.max_context)
        logits, checks = _full_context(weights, tokens, np.int32(one.done), wanted, recorded, **options)
        rows = [slice(record.row + 1 - record.judged, record.row + 1) for record in one.steps]
        cached = np.concatenate([np.asarray(record.logits)[row] for record, row in zip(one.steps, rows, strict=True)])
        expected = np.asarray(logits)[:compared]
        result.difference = float(np.maximum(result.difference, np.abs(cached - expected).max()))
        result.scale = max(result.scale, float(np.abs(expected).max()))
        result.positions += compared
        result.entries.add(checks.entries)
        result.experts.add(checks.experts)
        if progress:
            progress()
    return result


def _recorded(one: Served, max_context: int) -> Choices:
    """What was chosen for each token of the request, as the model has it for the tokens of a step; -1 after its end."""

    def joined(records: list[np.ndarray]) -> jax.Array:
        layers, _, width = records[0].shape
        whole = np.full((layers, max_context, width), -1, np.int32)
        for record, array in zip(one.steps, records, strict=True):
            columns = slice(record.column, record.column + record.tokens)
            whole[:, record.first : record.first + record.tokens] = array[:, columns]
        return jnp.asarray(whole)

    entries = joined([np.asarray(record.choices.entries) for record in one.steps])
    return Choices(entries, joined([np.asarray(record.choices.experts) for record in one.steps]))
