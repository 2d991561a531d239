"""ShardedPlan: the plans of one step of several shards, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.layout.plan import PlanLayout, StepPlan


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedPlan:
    """A step of all shards, of the same layout in each.

    Attributes:
      parts: the plan of each shard, without requests where it has none in the step.
      handles: int64 [n], the requests, in the order in which they were given.
    """

    parts: tuple[StepPlan, ...]
    handles: NDArray[np.int64]

    @property
    def layout(self) -> PlanLayout:
        """Of every part."""
        return self.parts[0].layout

    @property
    def step_plan(self) -> StepPlan:
        """What a step in ``jax.shard_map`` takes: the parts side by side on the last axis, [..., shards * size]."""
        return StepPlan(np.concatenate([part.packed for part in self.parts], axis=-1), self.layout)

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64 [n]: where each request's results are in what comes out of all shards, [shards * R, ...]."""
        return self._over_shards(lambda part, count: np.arange(count), self.layout.requests)

    @property
    def columns(self) -> NDArray[np.int64]:
        """int64 [n]: where each request's tokens begin among those of all shards, [shards * T, ...]; of one step."""
        return self._over_shards(lambda part, count: part.query_start[:count], self.layout.tokens)

    def _over_shards(self, places: Callable[[StepPlan, int], NDArray[np.integer]], size: int) -> NDArray[np.int64]:
        """For each request its place in its shard's part, of which each is as long as ``size``."""
        made = np.zeros(self.handles.size, np.int64)
        for shard, part in enumerate(self.parts):
            members = self.members(shard)
            made[members] = shard * size + places(part, members.size)
        return made

    def pack_tokens(self, tokens: Sequence[ArrayLike]) -> NDArray[np.int32]:
        """Token ids for all shards, int32 [shards * T], of one sequence (or one integer) for each request, in order."""
        if len(tokens) != self.handles.size:
            raise ValueError(f"the plan holds {self.handles.size} requests, got tokens for {len(tokens)}")
        return np.concatenate(
            [
                part.pack_tokens([np.atleast_1d(tokens[index]) for index in self.members(shard).tolist()])
                for shard, part in enumerate(self.parts)
            ]
        )

    def members(self, shard: int) -> NDArray[np.int64]:
        """Which of the requests are in a shard, by their place among all, in the order of its plan."""
        return (self.handles % len(self.parts) == shard).nonzero()[0]


def largest(layouts: Sequence[PlanLayout]) -> PlanLayout:
    """The smallest layout of those of one manager that takes what each of these takes."""
    most = max(layouts, key=lambda layout: layout.tokens)
    return dataclasses.replace(most, displaces=any(layout.displaces for layout in layouts))
