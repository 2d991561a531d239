"""StepPlan: everything a step needs to know about its requests, in one int32 vector.

``PlanLayout`` says where each field lies in that vector: the host packs with it, the device slices with it, and the
kernels' ``ffi/common/geometry.h`` follows it. ``build_plan`` fills a vector from slots, positions and counts,
``build_plans`` those of several steps; ``CacheManager.prepare_forward`` calls them after reserving blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.config import LayerKind

RATIOS = (LayerKind.CSA.ratio, LayerKind.HCA.ratio)
BLOCK_TOKENS = math.lcm(*RATIOS)

TableChanges = tuple[ArrayLike, ArrayLike, ArrayLike]


@dataclasses.dataclass(frozen=True)
class PlanLayout:
    """The shapes of a plan, and so of every step compiled for it.

    Attributes:
      tokens: T, how many tokens a step of this layout holds, padding included.
      requests: R, how many requests it holds, padding included.
    """

    tokens: int
    requests: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.requests < 1:
            raise ValueError(f"a plan holds at least 1 token and 1 request, got {self.tokens} and {self.requests}")

    def closing_size(self, ratio: int) -> int:
        """The most windows of ``ratio`` tokens that T tokens of R requests can close: (T + (ratio - 1) R) // ratio."""
        if ratio not in RATIOS:
            raise ValueError(f"ratio must be one of {RATIOS}, got {ratio}")
        return (self.tokens + (ratio - 1) * self.requests) // ratio

    @property
    def table_changes(self) -> int:
        """The most blocks that T tokens of R requests can add: T // 128 + R."""
        return self.tokens // BLOCK_TOKENS + self.requests

    @functools.cached_property
    def fields(self) -> Mapping[str, slice]:
        """Field name -> its slice of the packed vector's last axis, in packing order."""
        sizes = {
            "token_slot": self.tokens,
            "token_position": self.tokens,
            "token_request": self.tokens,
            "request_slot": self.requests,
            "request_reset": self.requests,
            "query_start": self.requests + 1,
            "table_slot": self.table_changes,
            "table_index": self.table_changes,
            "table_block": self.table_changes,
        } | {f"closing_{ratio}": self.closing_size(ratio) for ratio in RATIOS}
        sizes["longest"] = 1
        slices, offset = {}, 0
        for name, size in sizes.items():
            slices[name] = slice(offset, offset + size)
            offset += size
        return MappingProxyType(slices)

    @functools.cached_property
    def size(self) -> int:
        """Length of the packed vector."""
        return max(field.stop for field in self.fields.values())


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """The requests, tokens, block-table changes and closing windows of one step.

    A pytree with one leaf, ``packed``; ``layout`` is static, so steps of one layout share one compilation. All fields
    below are slices of ``packed``: NumPy arrays on the host, traced arrays inside jit. -1 marks padding unless said
    otherwise. Tokens lie flat, each request's together and in ascending positions, requests in the order given. Padding
    comes last as planned, but ``stop`` makes padding of any part.

    Attributes:
      packed: int32 [layout.size], or [steps, layout.size] when the plans of several steps are stacked for a scan (the
        fields then have the same leading axis).
      layout: where each field lies.
      receipt: how the manager that made the plan recognises it in ``cancel``. Host only: not part of the pytree, None
        after jit or ``jax.device_put``.
    """

    packed: Any
    layout: PlanLayout
    receipt: object | None = dataclasses.field(default=None, repr=False)

    def _field(self, name: str) -> Any:
        return self.packed[..., self.layout.fields[name]]

    @property
    def token_slot(self) -> Any:
        """int32 [T]: the slot of each token's request."""
        return self._field("token_slot")

    @property
    def token_position(self) -> Any:
        """int32 [T]: each token's 0-based position in its request."""
        return self._field("token_position")

    @property
    def token_request(self) -> Any:
        """int32 [T]: each token's request, as an index into the [R] fields."""
        return self._field("token_request")

    @property
    def request_slot(self) -> Any:
        """int32 [R]: each request's slot."""
        return self._field("request_slot")

    @property
    def request_reset(self) -> Any:
        """int32 [R]: 1 where the slot must first be cleared of its former owner, else 0 (also for padding)."""
        return self._field("request_reset")

    @property
    def query_start(self) -> Any:
        """int32 [R + 1]: flat index of each request's first token; the number of tokens for padding and at the end.

        The tokens of a stopped request keep their place, so that the others keep theirs.
        """
        return self._field("query_start")

    @property
    def table_slot(self) -> Any:
        """int32 [T // 128 + R]: block-table changes, ``block_table[table_slot, table_index] = table_block``."""
        return self._field("table_slot")

    @property
    def table_index(self) -> Any:
        """int32 [T // 128 + R]: see ``table_slot``."""
        return self._field("table_index")

    @property
    def table_block(self) -> Any:
        """int32 [T // 128 + R]: see ``table_slot``."""
        return self._field("table_block")

    def closing(self, ratio: int) -> Any:
        """int32 [(T + (ratio - 1) R) // ratio]: flat index of each token with (position + 1) % ratio == 0.

        These tokens close a window. In order, padding last; but with T == R, a decode step's layout, token i has place
        i, so that a kernel finds what belongs to a token without a search. `ratio` is 4 (CSA) or 128 (HCA), ValueError
        otherwise.
        """
        if ratio not in RATIOS:
            raise ValueError(f"ratio must be one of {RATIOS}, got {ratio}")
        return self._field(f"closing_{ratio}")

    @property
    def longest(self) -> Any:
        """int32 [1]: at least what any request brings in tokens (exactly the most, unless some are stopped).

        0 for a step planned without requests.
        """
        return self._field("longest")

    @property
    def request_start(self) -> Any:
        """int32 [R]: position of each request's first token of the step."""
        xp = self.packed.__array_namespace__()
        first = xp.minimum(self.query_start[..., :-1], self.layout.tokens - 1)
        return xp.where(self.request_slot >= 0, xp.take_along_axis(self.token_position, first, axis=-1), -1)

    @property
    def request_end(self) -> Any:
        """int32 [R]: each request's next position after the step."""
        xp = self.packed.__array_namespace__()
        start, query_start = self.request_start, self.query_start
        return xp.where(start >= 0, start + query_start[..., 1:] - query_start[..., :-1], -1)

    @property
    def last_token(self) -> Any:
        """int32 [R]: flat index of each request's last token, where its next-token logits are."""
        xp = self.packed.__array_namespace__()
        return xp.where(self.request_slot >= 0, self.query_start[..., 1:] - 1, -1)

    def step(self, index: Any) -> StepPlan:
        """One step of a stacked plan; ``index`` may be traced, for a ``lax.while_loop`` (a ``lax.scan`` needs no help).

        Raises:
          ValueError: the plan is of one step already.
        """
        if self.packed.ndim != 2:
            raise ValueError(f"step picks from a stacked plan, packed [steps, size]; this one has {self.packed.shape}")
        return StepPlan(self.packed[index], self.layout)

    def stop(self, stopped: ArrayLike) -> StepPlan:
        """The step without some of its requests: their part of the plan becomes padding, all else stays where it is.

        For many steps in one dispatch, in which the device finds out that a text has ended. A stopped request writes
        nothing: no row, no entry, no block-table change, no reset. Give the result to ``begin_step``. A request that is
        stopped in one step must be stopped in all that follow, since its positions would have a gap;
        ``CacheManager.commit`` then tells the host how many steps each one ran.

        Args:
          stopped: bool [R], in the plan's order of requests; anything for padding.

        Returns:
          A plan on the device, of the same layout and without receipt. Pure; works inside jit.

        Raises:
          ValueError: the plan is stacked (pick a step, or use ``jax.vmap``), or the mask is not [R].
        """
        packed, stopped = jnp.asarray(self.packed), jnp.asarray(stopped, bool)
        if packed.ndim != 1 or stopped.shape != (self.layout.requests,):
            raise ValueError(
                f"stop takes the plan of one step and a mask [{self.layout.requests}]; "
                f"got packed {packed.shape} and a mask {stopped.shape}"
            )
        plan = StepPlan(packed, self.layout)
        # Padding indexes from the end; whatever it finds there, it stays padding.
        token = stopped[plan.token_request]
        change = (plan.table_slot[:, None] == jnp.where(stopped, plan.request_slot, -1)).any(axis=1)
        masks = dict.fromkeys(("token_slot", "token_position", "token_request"), token)
        masks |= dict.fromkeys(("request_slot", "request_reset"), stopped)
        masks |= dict.fromkeys(("table_slot", "table_index", "table_block"), change)
        masks |= {f"closing_{ratio}": token[plan.closing(ratio)] for ratio in RATIOS}
        fields = self.layout.fields
        padding = np.full(self.layout.size, -1, np.int32)
        padding[fields["request_reset"]] = 0
        mask = [masks.get(name, np.zeros(where.stop - where.start, bool)) for name, where in fields.items()]
        return StepPlan(jnp.where(jnp.concatenate(mask), padding, packed), self.layout)

    def pack_tokens(self, tokens: ArrayLike | Iterable[ArrayLike]) -> NDArray[np.int32]:
        """Token ids in plan order, padded with 0. Host only.

        Args:
          tokens: one integer sequence (or one integer) per request, in the order the requests were given to
            ``prepare_forward``; or all tokens of the step in that order as one flat array.

        Returns:
          int32 [T].

        Raises:
          ValueError: the number of tokens is not the plan's, in all or for one request, or they are not integers.
        """
        query_start = np.asarray(self.query_start)
        if query_start.ndim != 1:
            raise ValueError("pack_tokens works on the plan of one step, this one holds several")
        if getattr(tokens, "ndim", None) == 1:
            flat = np.asarray(tokens)
        else:
            parts = [np.atleast_1d(np.asarray(part)) for part in tokens]
            requests = int(np.count_nonzero(self.request_slot >= 0))
            if len(parts) != requests:
                raise ValueError(f"the plan holds {requests} requests, got tokens for {len(parts)}")
            for request, (part, count) in enumerate(zip(parts, np.diff(query_start).tolist(), strict=False)):
                if part.shape != (count,):
                    raise ValueError(f"request {request} of the plan has {count} tokens, got shape {part.shape}")
            flat = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        if flat.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, got {flat.dtype}")
        if flat.size != query_start[-1]:
            raise ValueError(f"the plan holds {query_start[-1]} tokens, got {flat.size}")
        padded = np.zeros(self.layout.tokens, np.int32)
        padded[: flat.size] = flat
        return padded


jax.tree_util.register_dataclass(StepPlan, data_fields=["packed"], meta_fields=["layout"], drop_fields=["receipt"])


def build_plan(
    layout: PlanLayout,
    slots: ArrayLike,
    starts: ArrayLike,
    counts: ArrayLike,
    resets: ArrayLike | None = None,
    table_changes: TableChanges | None = None,
    *,
    receipt: object | None = None,
) -> StepPlan:
    """The plan of a step: ``counts[i]`` tokens from position ``starts[i]`` for the request in slot ``slots[i]``.

    Pure: reserves nothing, checks only that the step fits the layout (``CacheManager.prepare_forward`` does the rest).

    Args:
      layout: shapes of the plan.
      slots: integers [n], n <= layout.requests, distinct.
      starts: integers [n], position of each request's first token.
      counts: integers [n], each at least 1, at most layout.tokens together.
      resets: [n] booleans, or None for ``starts == 0``.
      table_changes: (slot, index, block), integers [k] each, k <= layout.table_changes, or None for no change.
      receipt: see ``StepPlan``.

    Returns:
      A StepPlan with a read-only NumPy vector. No request at all gives only padding: a step that changes nothing.

    Raises:
      ValueError: more requests, tokens or table changes than the layout holds.
    """
    slots, starts, counts = np.asarray(slots, np.intp), np.asarray(starts, np.intp), np.asarray(counts, np.intp)
    requests, tokens = slots.size, int(counts.sum())
    changes = 0 if table_changes is None else np.size(table_changes[0])
    if requests > layout.requests or tokens > layout.tokens or changes > layout.table_changes:
        raise ValueError(
            f"{requests} requests, {tokens} tokens and {changes} table changes do not fit a plan of "
            f"{layout.requests}, {layout.tokens} and {layout.table_changes}"
        )

    packed = np.full(layout.size, -1, np.int32)
    fields = {name: packed[where] for name, where in layout.fields.items()}
    query_start = fields["query_start"]
    query_start[0] = 0
    np.cumsum(counts, out=query_start[1 : requests + 1])
    query_start[requests + 1 :] = tokens
    fields["longest"][0] = counts.max(initial=0)
    fields["request_slot"][:requests] = slots
    fields["request_reset"][:] = 0
    fields["request_reset"][:requests] = starts == 0 if resets is None else resets

    position = fields["token_position"][:tokens]
    if tokens == requests:
        fields["token_slot"][:tokens] = slots
        fields["token_request"][:tokens] = np.arange(requests)
        position[:] = starts
    else:
        request = np.repeat(np.arange(requests), counts)
        fields["token_slot"][:tokens] = slots[request]
        fields["token_request"][:tokens] = request
        position[:] = np.arange(tokens) + (starts - query_start[:requests])[request]

    for ratio in RATIOS:
        closing = np.flatnonzero((position & (ratio - 1)) == ratio - 1)
        fields[f"closing_{ratio}"][closing if layout.tokens == layout.requests else slice(closing.size)] = closing
    if table_changes is not None:
        for name, values in zip(("table_slot", "table_index", "table_block"), table_changes, strict=True):
            fields[name][:changes] = values
    packed.flags.writeable = False
    return StepPlan(packed, layout, receipt)


def build_plans(
    layout: PlanLayout,
    steps: int,
    slots: ArrayLike,
    starts: ArrayLike,
    counts: ArrayLike,
    resets: ArrayLike | None = None,
    table_changes: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike] | None = None,
    *,
    receipt: object | None = None,
) -> StepPlan:
    """The plans of successive steps that bring the same number of tokens each, stacked.

    Args:
      layout: shapes of each step's plan.
      steps: how many.
      slots: as for ``build_plan``.
      starts: as for ``build_plan``, of the first step.
      counts: as for ``build_plan``, of every step.
      resets: of the first step, as for ``build_plan``; no later step resets.
      table_changes: (step, slot, index, block), integers [k] each, ascending by step, at most layout.table_changes for
        one step; or None.
      receipt: see ``StepPlan``.

    Returns:
      A StepPlan with a read-only NumPy array [steps, layout.size], whose row i is what ``build_plan`` makes for step i.

    Raises:
      ValueError: as ``build_plan``.
    """
    first = build_plan(layout, slots, starts, counts, resets)
    packed = np.tile(first.packed, (steps, 1))
    fields = {name: packed[:, where] for name, where in layout.fields.items()}
    fields["request_reset"][1:] = 0
    request = first.token_request[: first.query_start[-1]]
    position = fields["token_position"][:, : request.size]
    position += np.arange(steps, dtype=np.int32)[:, None] * np.asarray(counts, np.int32)[request]
    for ratio in RATIOS:
        step, token = np.nonzero((position & (ratio - 1)) == ratio - 1)
        closing = fields[f"closing_{ratio}"]
        closing[:] = -1
        closing[step, token if layout.tokens == layout.requests else _place_in_run(step)] = token
    if table_changes is not None:
        step, *values = map(np.asarray, table_changes)
        place = _place_in_run(step)
        if place.max(initial=-1) >= layout.table_changes:
            raise ValueError(f"{place.max() + 1} table changes in one step do not fit a plan of {layout.table_changes}")
        for name, value in zip(("table_slot", "table_index", "table_block"), values, strict=True):
            fields[name][step, place] = value
    packed.flags.writeable = False
    return StepPlan(packed, layout, receipt)


def _place_in_run(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal values come before each one; [n] ascending -> [n]."""
    return np.arange(values.size) - np.searchsorted(values, values)
