"""Batch: the requests of a step, looked up and checked once; and where they stand, for the next step of the same."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.planning import PlanFrame
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.spec.kinds import BLOCK_TOKENS, LayerKind
from dsv4_jax.spec.model import ModelSpec

# Arrays, since NumPy converts a number anew at every operation.
_BLOCK, _LAST_OF_BLOCK = np.array(BLOCK_TOKENS), np.array(BLOCK_TOKENS - 1)


class BlockNeed:
    """How many blocks a request of some length holds, in a model."""

    def __init__(self, spec: ModelSpec) -> None:
        has_csa = spec.count(LayerKind.CSA) > 0
        self._has_blocks = has_csa or spec.count(LayerKind.HCA) > 0
        # A request needs block i once it has this many tokens more than i blocks hold.
        self.first_entry = np.array(LayerKind.CSA.ratio if has_csa else LayerKind.HCA.ratio)

    def blocks(self, length: ArrayLike) -> NDArray[np.int64]:
        """Blocks of requests of these lengths, see ``CacheManager.blocks_needed``."""
        length = np.asarray(length, np.int64)
        if self._has_blocks:
            return (length + (_BLOCK - self.first_entry)) // _BLOCK
        return np.zeros_like(length)

    def due(self, length: NDArray[np.int64]) -> NDArray[np.int64]:
        """The lengths from which requests of these lengths need one more block: BLOCK_TOKENS n + first_entry for n."""
        if self._has_blocks:
            return ((length - self.first_entry) | _LAST_OF_BLOCK) + (self.first_entry + 1)
        return np.full_like(length, np.iinfo(np.int64).max)


class Batch:
    """Requests that bring so many tokens each, as ``prepare_forward`` was given them.

    Attributes:
      slots: int64 [n].
      counts: int64 [n], tokens of each in a step.
      most: the largest of them, 0 without requests.
      frame: what the plans of such steps share.
      wanted: the layout that the caller asked for, None if any would do.
    """

    def __init__(
        self,
        handles: NDArray[np.int64],
        counts: NDArray[np.int64],
        slots: NDArray[np.int64],
        most: int,
        layout: PlanLayout,
        wanted: PlanLayout | None = None,
    ) -> None:
        self.wanted = wanted
        self._handles, self._counts = handles.tobytes(), counts.tobytes()
        self.slots, self.counts, self.most = slots, counts.copy(), most  # the caller's array may change
        self.frame = PlanFrame(layout, slots, counts)

    def is_of(self, handles: NDArray[np.int64], counts: NDArray[np.int64]) -> bool:
        """Whether these are its requests and counts, in its order."""
        return handles.tobytes() == self._handles and counts.tobytes() == self._counts


@dataclasses.dataclass
class Standing:
    """Where the requests of a batch stand between two steps. Nothing in it is ever written again.

    Attributes:
      batch: the requests.
      lengths: int64 [n], tokens of each.
      block_due: int64 [n], the length from which each needs one more block than it has.
      longest: no request is longer.
      resets: bool [n], whose slots their next step must clear; None if no one's.
      change: the number of the journal's latest write; a later one may have changed anything.
    """

    batch: Batch
    lengths: NDArray[np.int64]
    block_due: NDArray[np.int64]
    longest: int
    resets: NDArray[np.bool_] | None
    change: int

    def allows(
        self,
        handles: NDArray[np.int64],
        counts: NDArray[np.int64],
        steps: int,
        wanted: PlanLayout | None,
        change: int,
        max_context: int,
    ) -> bool:
        """Whether so many steps of these can follow, but for blocks, without looking further.

        They can if the batch is of these, nothing has changed since, and none can come to exceed ``max_context``: the
        requests are then still admitted and distinct, and where the batch left them.
        """
        return (
            self.change == change
            and self.batch.wanted == wanted
            and self.batch.is_of(handles, counts)
            and self.longest + self.batch.most * steps <= max_context
        )

    def after(self, steps: int, block_due: NDArray[np.int64], ends: NDArray[np.int64], change: int) -> Standing:
        """Where they stand after so many steps, planned by the write ``change``."""
        return Standing(self.batch, ends, block_due, self.longest + self.batch.most * steps, None, change)

    def new_blocks(
        self, ends: NDArray[np.int64], need: BlockNeed, by_step: bool
    ) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None, NDArray[np.int64]]:
        """What blocks the requests need to grow to ``ends``: (step, slot, index) of each or None, then ``block_due``.

        In order of the requests or, ``by_step``, of the steps that first need them.
        """
        growing = (ends >= self.block_due).nonzero()[0]
        if not growing.size:
            return None, self.block_due
        due, reached, block_due = self.block_due[growing], ends[growing], self.block_due.copy()
        request, index, next_due = growing, (due - need.first_entry) // _BLOCK, due + _BLOCK
        if np.count_nonzero(reached >= next_due):  # some need more than one
            added = need.blocks(reached) - index
            next_due = due + _BLOCK * added
            request = growing.repeat(added)
            index = np.arange(request.size) + (index - (added.cumsum() - added)).repeat(added)
        block_due[growing] = next_due
        step = np.zeros(request.size, np.int64)
        if by_step:
            step = (_BLOCK * index + need.first_entry - self.lengths[request] - 1) // self.batch.counts[request]
            order = step.argsort(kind="stable")
            step, request, index = step[order], request[order], index[order]
        return (step, self.batch.slots[request], index), block_due
