"""StepPlan: everything a step needs to know about its requests, in one int32 vector.

``PlanLayout`` says where each field lies in that vector: the host packs with it, the device slices with it, and the
kernels' ``ffi/layout/geometry.h`` follows it. ``build_plan`` fills a vector from slots, positions and counts,
``build_plans`` those of several steps; ``CacheManager.prepare_forward`` calls them after reserving blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.json_text import is_count, parse_json
from dsv4_jax.spec.kinds import BLOCK_TOKENS, RATIOS


@dataclasses.dataclass(frozen=True)
class PlanLayout:
    """The shapes of a plan, and so of every step compiled for it.

    Attributes:
      tokens: T, how many tokens a step of this layout holds, padding included.
      requests: R, how many requests it holds, padding included.
      fingerprint: of the schema whose slots and blocks the plan names, "" if that is not known. Plans of another schema
        have another layout, and so nothing compiled for one takes the other's.
      displaces: whether a request may bring more tokens than the ring has rows to spare, ``lookahead + 1``. They take
        the place of window rows that earlier ones of the same step still see, which the step then saves; a step of a
        layout that says no saves nothing.
    """

    tokens: int
    requests: int
    fingerprint: str = ""
    displaces: bool = True

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

    @property
    def closings_by_token(self) -> bool:
        """Whether the ``closing`` fields have a place for every token: place i is token i's, -1 unless it closes.

        Then whoever has a token finds what it closes without a search. So it is where T == R, as in a decode step's
        layout; else the closing tokens lie together in order, padding last.
        """
        return self.tokens == self.requests

    @property
    def fields(self) -> Mapping[str, slice]:
        """Field name -> its slice of the packed vector's last axis, in packing order."""
        return _fields(self)

    @property
    def size(self) -> int:
        """Length of the packed vector."""
        return _fields(self)["longest"].stop


@functools.cache
def _fields(layout: PlanLayout) -> Mapping[str, slice]:
    # Beside the layout rather than cached in it, so that a layout is its numbers and nothing else when it is copied.
    sizes = {
        "token_slot": layout.tokens,
        "token_position": layout.tokens,
        "token_request": layout.tokens,
        "request_slot": layout.requests,
        "request_reset": layout.requests,
        "query_start": layout.requests + 1,
        "table_slot": layout.table_changes,
        "table_index": layout.table_changes,
        "table_block": layout.table_changes,
    } | {f"closing_{ratio}": layout.closing_size(ratio) for ratio in RATIOS}
    sizes["longest"] = 1
    slices, offset = {}, 0
    for name, size in sizes.items():
        slices[name] = slice(offset, offset + size)
        offset += size
    return MappingProxyType(slices)


class Receipt(NamedTuple):
    """By what a manager knows a plan.

    Attributes:
      manager: the name of the manager that made it.
      serial: its place among that manager's plans, the order in which they run.
      issued: when it was made on the manager's clock, which no other plan has. Later than ``serial`` if it is what was
        left of an earlier plan.
      drafts: what the manager remembers of the plan's drafts, if its cache can take any back.
    """

    manager: str
    serial: int
    issued: int
    drafts: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """The requests, tokens, block-table changes and closing windows of one step.

    A pytree with one leaf, ``packed``; ``layout`` is static, so steps of one layout share one compilation. All fields
    below are slices of ``packed``: NumPy arrays on the host, traced arrays inside jit. -1 marks padding unless said
    otherwise. Tokens lie flat, each request's together and in ascending positions, requests in the order given. Padding
    comes last as planned, but ``stop`` makes padding of any part.

    An axis in front of the fields means steps, and nothing else. The plans of several shards of a cache lie side by
    side on the last axis, [shards * size] or [steps, shards * size]: ``jax.shard_map``, which splits that axis, hands
    each shard a plan of its own. Outside it such a plan has no fields.

    Attributes:
      packed: int32 [size], or [steps, size] when the plans of several steps are stacked for a scan (the fields then
        have the same leading axis); size is ``layout.size``.
      layout: where each field lies.
      receipt: how the manager that made the plan recognises it in ``cancel``. Host only: not part of the pytree, None
        after jit or ``jax.device_put``.
    """

    packed: Any
    layout: PlanLayout
    receipt: Receipt | None = dataclasses.field(default=None, repr=False)

    def _field(self, name: str) -> Any:
        if self.packed.shape[-1] != self.layout.size:
            raise ValueError(
                f"the plan's last axis holds {self.packed.shape[-1]} numbers, a plan of {self.layout} has "
                f"{self.layout.size}: the plans of several shards lie side by side on that axis, and are read inside "
                "jax.shard_map, which splits it"
            )
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

        These tokens close a window. In order, padding last; but with ``layout.closings_by_token`` each is at its own
        index, -1 between. `ratio` is 4 (CSA) or 128 (HCA), ValueError otherwise.
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
        nothing: no row, no entry, no block-table change, no reset. Give the result to ``begin``. A request that is
        stopped in one step must be stopped in all that were planned by then, since its positions would have a gap
        (``rebase`` would close that) and its block-table changes are lost; ``CacheManager.commit`` then tells the host
        how far each one came.

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
        change = (plan.table_slot[:, None] == jnp.where(stopped, plan.request_slot, -1)[None, :]).any(axis=1)
        masks: dict[str, Any] = dict.fromkeys(("token_slot", "token_position", "token_request"), token)
        masks |= dict.fromkeys(("request_slot", "request_reset"), stopped)
        masks |= dict.fromkeys(("table_slot", "table_index", "table_block"), change)
        masks |= {f"closing_{ratio}": token[plan.closing(ratio)] for ratio in RATIOS}
        fields = self.layout.fields
        padding = np.full(self.layout.size, -1, np.int32)
        padding[fields["request_reset"]] = 0
        mask = [masks.get(name, np.zeros(where.stop - where.start, bool)) for name, where in fields.items()]
        return StepPlan(jnp.where(jnp.concatenate(mask), padding, packed), self.layout)

    def rebase(self, lengths: ArrayLike) -> StepPlan:
        """The step from the lengths that requests really have: positions and closing windows are worked out anew.

        For speculative decoding. The host plans the next step before it knows how many drafts of the last one were
        kept, so from the longest that each request can be; the device knows, and brings the plan to it. Everything
        else stays as planned: slots, counts, resets, and block-table changes, which come early at worst.

        Args:
          lengths: int32 [R], tokens of each request before the step, in the plan's order. A request that was planned
            from a smaller length stays there: so anything will do for one that the plan resets, for padding, and, if
            large, for one whose length the host knew.

        Returns:
          A plan on the device, of the same layout and without receipt. Pure; works inside jit. Give it to ``begin``;
          ``stop`` may come before or after.

        Raises:
          ValueError: the plan is stacked (pick a step, or use ``jax.vmap``), or lengths are not integers [R].
        """
        packed, lengths = jnp.asarray(self.packed), jnp.asarray(lengths)
        integers = jnp.issubdtype(lengths.dtype, jnp.integer)
        if packed.ndim != 1 or lengths.shape != (self.layout.requests,) or not integers:
            raise ValueError(
                f"rebase takes the plan of one step and integers [{self.layout.requests}]; "
                f"got packed {packed.shape} and lengths {lengths.dtype} {lengths.shape}"
            )
        plan, tokens = StepPlan(packed, self.layout), self.layout.tokens
        start = plan.request_start
        back = start - jnp.clip(lengths.astype(jnp.int32), jnp.minimum(start, 0), start)
        position = plan.token_position
        position = jnp.where(position >= 0, position - back[plan.token_request], position)
        changed = {"token_position": position}
        for ratio in RATIOS:
            closes = (position >= 0) & (position % ratio == ratio - 1)
            if self.layout.closings_by_token:
                closing = jnp.where(closes, jnp.arange(tokens, dtype=jnp.int32), -1)
            else:
                closing = jnp.nonzero(closes, size=self.layout.closing_size(ratio), fill_value=-1)[0]
            changed[f"closing_{ratio}"] = closing.astype(jnp.int32)
        parts = [changed.get(name, packed[where]) for name, where in self.layout.fields.items()]
        return StepPlan(jnp.concatenate(parts), self.layout)

    def pack_tokens(self, tokens: ArrayLike | Iterable[ArrayLike]) -> NDArray[np.int32]:
        """Token ids in plan order, padded with 0. Host only.

        Args:
          tokens: one integer sequence (or one integer) per request, in the order the requests were given to
            ``prepare_forward``; or all tokens of the step in that order, flat: as one array, or, if there is a single
            request, as its list.

        Returns:
          int32 [T].

        Raises:
          ValueError: the number of tokens is not the plan's, in all or for one request, or they are not integers.
        """
        query_start = np.asarray(self.query_start)
        if query_start.ndim != 1:
            raise ValueError("pack_tokens works on the plan of one step, this one holds several")
        requests = int(np.count_nonzero(self.request_slot >= 0))
        given: Any = tokens
        if getattr(tokens, "ndim", None) != 1:
            given = [np.asarray(part) for part in given]
            if given and requests == 1 and all(part.ndim == 0 for part in given):
                given = np.asarray(given)
        if isinstance(given, list):
            parts = [np.atleast_1d(part) for part in given]
            if len(parts) != requests:
                raise ValueError(f"the plan holds {requests} requests, got tokens for {len(parts)}")
            for request, (part, count) in enumerate(zip(parts, np.diff(query_start).tolist(), strict=False)):
                if part.shape != (count,):
                    raise ValueError(f"request {request} of the plan has {count} tokens, got shape {part.shape}")
            flat = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        else:
            flat = np.asarray(given)
        if flat.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, got {flat.dtype}")
        if flat.size != query_start[-1]:
            raise ValueError(f"the plan holds {query_start[-1]} tokens, got {flat.size}")
        padded = np.zeros(self.layout.tokens, np.int32)
        padded[: flat.size] = flat
        return padded


def _layout_to_bytes(static: tuple[PlanLayout]) -> bytes:
    return json.dumps(dataclasses.asdict(static[0])).encode()


def _layout_from_bytes(data: bytes | bytearray) -> tuple[PlanLayout]:
    try:
        layout = PlanLayout(**parse_json(data))
        counts = is_count(layout.tokens) and is_count(layout.requests) and is_count(layout.size)
        if not counts or type(layout.fingerprint) is not str or type(layout.displaces) is not bool:
            raise ValueError(f"got {layout}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"this is no StepPlan of an exported program; export it again: {error}") from error
    return (layout,)


jax.tree_util.register_dataclass(StepPlan, data_fields=["packed"], meta_fields=["layout"], drop_fields=["receipt"])
jax.export.register_pytree_node_serialization(
    StepPlan,
    serialized_name="dsv4_jax.StepPlan",
    serialize_auxdata=_layout_to_bytes,
    deserialize_auxdata=_layout_from_bytes,
)
