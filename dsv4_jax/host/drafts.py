"""DraftTable: how many tokens of each request are drafts of which the host has not heard how many were kept.

A step that verifies drafts leaves a request's length open: the device knows it, and brings plans made meanwhile to it
(``StepPlan.rebase``). The host goes on with the most that it can be. What a later ``commit`` takes off that, it takes
off all later plans of the request too, so a plan remembers how much had been taken off when it was made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.arguments import draft_array
from dsv4_jax.host.journal import Write
from dsv4_jax.layout.schema import CacheSchema


@dataclasses.dataclass(frozen=True, eq=False)
class Drafted:
    """What a plan's receipt remembers of drafts; int64 [n] each, the plan's requests in order.

    Attributes:
      of_step: drafts among the tokens of each step.
      made: drafts that the request's plans have brought so far, this plan's included.
      taken_back: tokens that commits had taken off the request when the plan was made.
    """

    of_step: NDArray[np.int64]
    made: NDArray[np.int64]
    taken_back: NDArray[np.int64]


class DraftTable:
    """What is known of the drafts of each slot's request. Counts only ever grow, also from request to request.

    Attributes:
      made: int64 [slots], drafts that plans have brought so far.
      known: int64 [slots], how many of these the host has been told about.
      taken_back: int64 [slots], tokens that commits took off, drafts and others.
    """

    def __init__(self, schema: CacheSchema) -> None:
        slots = schema.slots
        self._lookahead = schema.lookahead
        self.made = np.zeros(slots, np.int64)
        self.known = np.zeros(slots, np.int64)
        self.taken_back = np.zeros(slots, np.int64)

    def is_open(self, slot: int) -> bool:
        """Whether drafts of the slot's request leave its length open."""
        return bool(self.made[slot] > self.known[slot])

    def remember(self, slots: NDArray[np.int64], of_step: NDArray[np.int64], made: NDArray[np.int64]) -> Drafted:
        """What a plan remembers that is made now, for requests in these slots."""
        return Drafted(of_step, made, self.taken_back.take(slots))

    def bring(
        self,
        drafts: Mapping[int, int] | ArrayLike | None,
        handles: NDArray[np.int64],
        slots: NDArray[np.int64],
        counts: NDArray[np.int64],
        steps: int,
    ) -> tuple[Drafted | None, tuple[Write, ...]]:
        """What a new plan of these requests remembers, and the writes that count its drafts.

        Nothing, where no tokens can be taken back. Raises InvalidStep.
        """
        of_step = None if drafts is None else draft_array(drafts, handles, counts, self._lookahead)
        if not self._lookahead:
            return None, ()
        made = self.made.take(slots)
        if of_step is None:
            return self.remember(slots, np.zeros_like(made), made), ()
        made += of_step * steps
        return self.remember(slots, of_step, made), ((self.made, slots, made),)

    def forget(self, slots: int | slice) -> tuple[Write, ...]:
        """The writes after which nothing is open: the request is gone, or is to begin anew."""
        return ((self.known, slots, self.made[slots]),)
