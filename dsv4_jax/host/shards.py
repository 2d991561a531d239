"""ShardedManager: a manager for each shard of a cache, before which they look like one.

A shard is a whole cache with slots, blocks, prefixes and snapshots of its own. A request is admitted to one and stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.accounts import PoolUsage
from dsv4_jax.host.arguments import count, drafts_in_order, integer, step_arrays
from dsv4_jax.host.errors import CacheError, InvalidStep, UnknownRequest
from dsv4_jax.host.events import Event
from dsv4_jax.host.hashing import Match
from dsv4_jax.host.journal import Write
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.host.parking import RequestRecord, fewest_lost
from dsv4_jax.host.sharded_plan import ShardedPlan, largest
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.layout.transfers import Transfers, side_by_side


class Room(NamedTuple):
    """What a shard has to offer a request that is to be admitted, or resumed.

    Attributes:
      shard: its number.
      admits: whether it can admit the request.
      cached: tokens of the prompt that need not be computed there; of a resumed request, none of which need be, those
        whose blocks are there and need not be written.
      stored: tokens of the prompt whose blocks are there, see ``Match``.
      free_blocks: blocks that no request holds or was promised.
      free_slots: how many more requests it can have.
    """

    shard: int
    admits: bool
    cached: int
    stored: int
    free_blocks: int
    free_slots: int


Route = Callable[[Sequence[Room]], int]
"""Chooses the shard of a new request, or of one that is resumed."""


def most_cached_then_most_room(rooms: Sequence[Room]) -> int:
    """Where fewest tokens of the prompt need be computed; of several, where most are stored, then where most blocks and
    then slots are free; the first of these.
    """
    wanted = operator.attrgetter("admits", "cached", "stored", "free_blocks", "free_slots")
    return max(rooms, key=wanted).shard


class ShardedManager:
    """Admits requests to shards, and plans a step of all of them at once.

    Each shard has a ``CacheManager``, whose methods are here with handles that count for all shards: handle ``h`` of
    ``managers[s]`` is ``h * shards + s``. What those methods say holds here, too. An exception from outside may come
    between two shards, of which one has then done its part.

    Attributes:
      managers: one for each shard, in the order in which they lie side by side. What concerns one request of theirs
        can be asked of them as well.
      schema: of one shard.
      route: chooses the shard of a new request.
      first: of the cache's shards, the number of ``managers[0]``'s.

    Args:
      schema: of one shard.
      shards: how many there are; of several processes, those whose devices this one has.
      token_buckets: as for ``CacheManager``, tokens of a step in one shard.
      route: chooses the shard of a new request.
      first: how many shards of the cache lie before these: those of the processes before this one.
      options: others of ``CacheManager``.
    """

    def __init__(
        self,
        schema: CacheSchema,
        shards: int,
        *,
        token_buckets: Sequence[int],
        route: Route = most_cached_then_most_room,
        first: int = 0,
        **options: Any,
    ) -> None:
        if count("shards", shards) < 1:
            raise ValueError("there is at least 1 shard, got 0")
        self.managers = tuple(CacheManager(schema, token_buckets=token_buckets, **options) for _ in range(shards))
        self.schema, self.route, self.first = schema, route, count("first", first)

    # Handles.

    def place(self, request: int) -> tuple[int, int]:
        """The shard of a handle, and the handle there; raises UnknownRequest."""
        request = integer("a request", request)
        shard, local = request % len(self.managers), request // len(self.managers)
        with self._named(shard):
            self.managers[shard].slot(local)
        return shard, local

    def handle(self, shard: int, local: int) -> int:
        """The handle of a shard's request."""
        return local * len(self.managers) + shard

    @contextlib.contextmanager
    def _named(self, shard: int) -> Generator[None]:
        """Errors of a shard's manager name its own handles; this has them name those of all shards, or say so."""
        try:
            yield
        except UnknownRequest as error:
            raise UnknownRequest([self.handle(shard, local) for local in error.requests]) from None
        except CacheError as error:
            error.add_note(f"in shard {shard}, whose request h is request {len(self.managers)} h + {shard} of all")
            raise

    @property
    def requests(self) -> NDArray[np.int64]:
        """int64 [admitted requests]: their handles, shard by shard, in order of admission."""
        return np.concatenate([manager.requests * len(self.managers) + s for s, manager in enumerate(self.managers)])

    def length(self, request: int) -> int:
        """As ``CacheManager.length``."""
        shard, local = self.place(request)
        return self.managers[shard].length(local)

    @property
    def free_slots(self) -> int:
        """How many more requests can be admitted."""
        return sum(manager.free_slots for manager in self.managers)

    @property
    def free_blocks(self) -> int:
        """How many blocks no request holds, in all shards."""
        return sum(manager.free_blocks for manager in self.managers)

    # Admission.

    def match_prefix(self, tokens: ArrayLike, *, salt: bytes = b"") -> Match:
        """As ``CacheManager.match_prefix``; ``length`` and ``stored`` are those of ``best_shard``."""
        match = self.managers[0].match_prefix(tokens, salt=salt)
        return self.managers[self.best_shard(match)].look_up(match)

    def best_shard(self, match: Match) -> int:
        """The shard where fewest tokens of a prompt need be computed; of several where most are stored; the first."""
        found = [manager.look_up(match) for manager in self.managers]
        return max(range(len(found)), key=lambda shard: (found[shard].length, found[shard].stored))

    def shard_to_record(self, match: Match) -> int:
        """The shard of which ``record`` takes most of a prompt, the first of several."""
        recordable = [manager.recordable(match) for manager in self.managers]
        return recordable.index(max(recordable))

    def rooms(self, prompt: int | Match | RequestRecord = 0, max_new_tokens: int | None = None) -> list[Room]:
        """What each shard has to offer a request that is to be admitted, or of which there is a record, in order."""
        rooms = []
        for shard, manager in enumerate(self.managers):
            blocks = manager.usage()["blocks"]
            if isinstance(prompt, RequestRecord):
                admits = manager.can_resume(prompt, max_new_tokens)
                cached = stored = manager.kept_tokens(prompt)
            else:
                admits, cached, stored = manager.can_admit(prompt, max_new_tokens), 0, 0
                if isinstance(prompt, Match):
                    found = manager.look_up(prompt)
                    cached, stored = found.length, found.stored
            free = blocks.cached + blocks.free - blocks.reserved
            rooms.append(Room(shard, admits, cached, stored, free, manager.free_slots))
        return rooms

    def can_admit(self, prompt: int | Match = 0, max_new_tokens: int | None = None) -> bool:
        """Whether some shard can, see ``CacheManager.can_admit``."""
        return any(manager.can_admit(prompt, max_new_tokens) for manager in self.managers)

    def admit(self, prompt: int | Match = 0, max_new_tokens: int | None = None, *, shard: int | None = None) -> int:
        """As ``CacheManager.admit``, in the shard that ``route`` chooses, or in the one given."""
        if shard is None:
            shard = self.route(self.rooms(prompt, max_new_tokens))
        return self.handle(shard, self.managers[shard].admit(prompt, max_new_tokens))

    def fork(self, request: int, max_new_tokens: int | None = None) -> int:
        """As ``CacheManager.fork``, in the same shard."""
        shard, local = self.place(request)
        with self._named(shard):
            return self.handle(shard, self.managers[shard].fork(local, max_new_tokens))

    def release(self, request: int) -> None:
        """As ``CacheManager.release``."""
        shard, local = self.place(request)
        self.managers[shard].release(local)

    def preempt(self, request: int) -> RequestRecord:
        """As ``CacheManager.preempt``."""
        shard, local = self.place(request)
        with self._named(shard):
            return self.managers[shard].preempt(local)

    def lost_tokens(self, request: int) -> int:
        """As ``CacheManager.lost_tokens``."""
        shard, local = self.place(request)
        return self.managers[shard].lost_tokens(local)

    def propose_victim(self, among: Iterable[int] | None = None) -> int | None:
        """As ``CacheManager.propose_victim``; where one shard is short of room, give the requests of that one."""
        handles = [int(handle) for handle in (self.requests if among is None else among)]
        return fewest_lost(handles, self.lost_tokens)

    def truncate(self, request: int, length: int) -> None:
        """As ``CacheManager.truncate``."""
        shard, local = self.place(request)
        with self._named(shard):
            self.managers[shard].truncate(local, length)

    def chunk_limit(self, request: int) -> int:
        """As ``CacheManager.chunk_limit``."""
        shard, local = self.place(request)
        return self.managers[shard].chunk_limit(local)

    def reset(self) -> None:
        """As ``CacheManager.reset``, in every shard."""
        for manager in self.managers:
            manager.reset()

    def reset_prefix_cache(self) -> None:
        """As ``CacheManager.reset_prefix_cache``, in every shard."""
        for manager in self.managers:
            manager.reset_prefix_cache()

    # Steps.

    @property
    def layouts(self) -> tuple[PlanLayout, ...]:
        """All the layouts that a plan can have."""
        return self.managers[0].layouts

    def layout_of(self, tokens: Mapping[int, int] | tuple[ArrayLike, ArrayLike]) -> PlanLayout:
        """The smallest layout in which every shard's part of a step fits; raises InvalidStep and StepTooLarge.

        With several processes, all of them must plan with the same: the largest of theirs, as ``largest`` gives it.
        """
        handles, counts = step_arrays(tokens)
        return largest([self._layout_of(shard, part) for shard, part in enumerate(self._parts(handles, counts))])

    def _layout_of(self, shard: int, counts: NDArray[np.int64]) -> PlanLayout:
        with self._named(shard):
            return self.managers[shard].layout_of(counts)

    def _parts(self, handles: NDArray[np.int64], values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        of = handles % len(self.managers)
        return [values[of == shard] for shard in range(len(self.managers))]

    def prepare_forward(
        self,
        tokens: Mapping[int, int] | tuple[ArrayLike, ArrayLike],
        *,
        drafts: Mapping[int, int] | ArrayLike | None = None,
        steps: int | None = None,
        layout: PlanLayout | None = None,
    ) -> ShardedPlan:
        """As ``CacheManager.prepare_forward``, for requests of any shards: all of them, or none.

        Args:
          tokens: see there; so are drafts and steps.
          drafts: see there.
          steps: see there.
          layout: what every shard's plan is to have; ``layout_of`` by default.
        """
        handles, counts = step_arrays(tokens)
        shards = len(self.managers)
        wanted = self.layout_of((handles, counts)) if layout is None else layout
        of, local = handles % shards, handles // shards
        guesses = None if drafts is None else drafts_in_order(drafts, handles)
        plans: list[StepPlan] = []
        try:
            for shard, manager in enumerate(self.managers):
                mine = of == shard
                of_mine = guesses[mine] if guesses is not None and guesses.shape == handles.shape else guesses
                with self._named(shard):
                    plans.append(
                        manager.prepare_forward((local[mine], counts[mine]), drafts=of_mine, steps=steps, layout=wanted)
                    )
        except BaseException:
            for manager, plan in zip(self.managers, plans, strict=False):
                manager.cancel(plan)
            raise
        return ShardedPlan(tuple(plans), handles.copy())

    def cancel(self, plan: ShardedPlan, requests: ArrayLike | None = None) -> ShardedPlan:
        """As ``CacheManager.cancel``; what is left has the same layout."""
        shards, left, writes = len(self.managers), list(plan.parts), []
        gone = plan.handles if requests is None else np.atleast_1d(np.asarray(requests))
        if gone.size and gone.dtype.kind not in "iu":
            raise InvalidStep(f"requests must be one handle or several, got {gone.dtype} {list(gone.shape)}")
        for shard, manager in enumerate(self.managers):
            mine = gone[gone % shards == shard] // shards
            if mine.size:
                with self._named(shard):
                    left[shard], written = manager._cancel(plan.parts[shard], mine, plan.layout)
                writes.append((manager, written))
        self._write(writes)
        return ShardedPlan(tuple(left), plan.handles[~np.isin(plan.handles, gone)])

    def commit(
        self,
        plan: ShardedPlan,
        steps_run: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        tokens: Sequence[ArrayLike] | Mapping[int, ArrayLike] | None = None,
    ) -> None:
        """As ``CacheManager.commit``.

        Args:
          plan: what ``prepare_forward`` returned.
          steps_run: one number for all, or one for each request, in order; or as the devices have them,
            [shards * R].
          lengths: likewise.
          tokens: as there, in order or by handle.
        """
        writes = []
        for shard, (manager, part) in enumerate(zip(self.managers, plan.parts, strict=True)):
            members, told = plan.members(shard), tokens
            if not members.size:
                continue
            if isinstance(tokens, Mapping):
                told = {h // len(self.managers): t for h, t in tokens.items() if h % len(self.managers) == shard}
            elif tokens is not None:
                told = [tokens[index] for index in members.tolist()]
            run, ends = (self._of_shard(plan, shard, values) for values in (steps_run, lengths))
            with self._named(shard):
                writes.append((manager, manager._commit(part, run, ends, told)))
        self._write(writes)

    @staticmethod
    def _of_shard(plan: ShardedPlan, shard: int, values: ArrayLike | None) -> ArrayLike | None:
        given = None if values is None else np.asarray(values)
        if given is None or given.ndim == 0:
            return given
        if given.shape == plan.handles.shape:
            return given[plan.members(shard)]
        if given.shape != (len(plan.parts) * plan.layout.requests,):
            raise InvalidStep(
                f"one number for each of the plan's {plan.handles.size} requests is needed, or for each of its "
                f"{len(plan.parts)} * {plan.layout.requests} places; got {list(given.shape)}"
            )
        return given.reshape(len(plan.parts), -1)[shard]

    @staticmethod
    def _write(writes: Sequence[tuple[CacheManager, tuple[Write, ...]]]) -> None:
        """What every shard's operation comes to, now that none of them has raised."""
        for manager, written in writes:
            manager._journal.write(written)

    # What else there is to know.

    @property
    def transfers_wait(self) -> bool:
        """Whether some shard's do."""
        return any(manager.transfers_wait for manager in self.managers)

    def take_transfers(self, *, again: bool = False) -> Transfers:
        """As ``CacheManager.take_transfers``, of all shards side by side on the first axis, for ``over_shards``."""
        return side_by_side([manager.take_transfers(again=again) for manager in self.managers])

    def take_events(self, *, again: bool = False) -> tuple[tuple[Event, ...], ...]:
        """As ``CacheManager.take_events``, of each shard: routers know blocks by where they are."""
        return tuple(manager.take_events(again=again) for manager in self.managers)

    def usage(self) -> dict[str, PoolUsage]:
        """As ``CacheManager.usage``, of all shards together."""
        of_shards = [manager.usage() for manager in self.managers]
        return {name: _sum([usage[name] for usage in of_shards]) for name in of_shards[0]}

    def metrics(self) -> Mapping[str, float]:
        """As ``CacheManager.metrics``, of all shards together."""
        of_shards = [manager.metrics() for manager in self.managers]
        together = {name: sum(metrics[name] for metrics in of_shards) for name in of_shards[0]}
        blocks = self.usage()["blocks"]
        return together | {"kv_cache_usage_perc": blocks.used / max(blocks.total, 1)}


def _sum(usages: Sequence[PoolUsage]) -> PoolUsage:
    names = ("total", "used", "shared", "cached", "free", "reserved")
    return dataclasses.replace(usages[0], **{name: sum(getattr(usage, name) for usage in usages) for name in names})
