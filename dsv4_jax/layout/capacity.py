"""How many bytes requests take and how many of them fit: what ``dsv4-jax capacity`` shows."""

from __future__ import annotations

import dataclasses

from dsv4_jax.host.manager import CacheManager
from dsv4_jax.layout.formats import CacheFormats
from dsv4_jax.layout.schema import CacheSchema, SchemaError, compute_block_budget
from dsv4_jax.spec.kinds import BLOCK_TOKENS
from dsv4_jax.spec.model import ModelSpec


@dataclasses.dataclass(frozen=True)
class CapacityPlan:
    """A cache and what its requests take of it; all sizes in bytes.

    Attributes:
      schema: the cache: ``init_cache(schema)`` takes ``memory_bytes``, to the byte.
      blocks_per_request: blocks that ``CacheManager`` reserves for a request of ``schema.max_context`` tokens.
    """

    schema: CacheSchema
    blocks_per_request: int

    @property
    def requests(self) -> int:
        """How many requests there can be at the same time."""
        return self.schema.slots

    @property
    def context(self) -> int:
        """The longest context of a request in tokens."""
        return self.schema.max_context

    @property
    def common_context(self) -> int:
        """Tokens of context that all ``requests`` can have at once: ``context``, or less if there are fewer blocks."""
        if self.schema.blocks >= self.requests * self.blocks_per_request:
            return self.context
        return self.schema.blocks // self.requests * BLOCK_TOKENS

    @property
    def memory_bytes(self) -> int:
        """The whole cache."""
        return self.schema.memory_bytes

    @property
    def block_bytes(self) -> dict[str, int]:
        """One block of 128 tokens, by component."""
        return {name: size for name, size in _one_of_each(self.schema).items() if name in self.schema.block_pools}

    @property
    def slot_bytes(self) -> dict[str, int]:
        """What a request takes whatever its length, by component; the tables' rows are as long as ``context``."""
        return {name: size for name, size in _one_of_each(self.schema).items() if name not in self.schema.block_pools}

    @property
    def request_bytes(self) -> dict[str, int]:
        """A request of ``context`` tokens, by component."""
        return self.slot_bytes | {name: size * self.blocks_per_request for name, size in self.block_bytes.items()}

    @property
    def bytes_per_request(self) -> int:
        """A request of ``context`` tokens."""
        return sum(self.request_bytes.values())


def capacity_plan(
    spec: ModelSpec,
    formats: CacheFormats,
    *,
    context: int,
    memory_bytes: int | None = None,
    requests: int | None = None,
    lookahead: int = 0,
) -> CapacityPlan:
    """The cache for some requests, or for some memory.

    Args:
      spec: the model.
      formats: how vectors are stored.
      context: longest context of a request in tokens.
      memory_bytes: bytes that the cache may take; without ``requests``, as many requests of ``context`` tokens as fit.
      requests: requests at the same time, 1 if neither this nor ``memory_bytes`` is given. Without ``memory_bytes``
        there are blocks for all of them at full length; with it, as many of those as fit.
      lookahead: as in ``CacheSchema``.

    Raises:
      SchemaError: the memory does not hold one request, or not the slots asked for; or a number is out of range.
    """
    if requests is None and memory_bytes is not None:
        requests = requests_that_fit(spec, formats, context=context, memory_bytes=memory_bytes, lookahead=lookahead)
        if not requests:
            one = capacity_plan(spec, formats, context=context, lookahead=lookahead)
            raise SchemaError(
                f"{memory_bytes:,} bytes do not hold one request of {context:,} tokens, which takes "
                f"{one.memory_bytes:,}; give more memory, or ask for a shorter context or smaller formats."
            )
    requests = 1 if requests is None else requests
    smallest = CacheSchema(spec, formats, requests, 1, context, lookahead)
    per_request = int(CacheManager(dataclasses.replace(smallest, slots=1), token_buckets=[1]).blocks_needed(context))
    blocks = max(requests * per_request, int(smallest.bytes_per_block > 0))
    if memory_bytes is not None:
        budget = compute_block_budget(
            memory_bytes, spec, formats, slots=requests, max_context=context, lookahead=lookahead
        )
        blocks = min(blocks, budget)
    return CapacityPlan(dataclasses.replace(smallest, blocks=blocks), per_request)


def requests_that_fit(
    spec: ModelSpec, formats: CacheFormats, *, context: int, memory_bytes: int, lookahead: int = 0
) -> int:
    """The largest number of requests of ``context`` tokens each whose cache takes at most ``memory_bytes``; 0 if none.

    Arguments as for ``capacity_plan``.

    Raises:
      SchemaError: ``context`` or ``lookahead`` is out of range.
    """
    one = capacity_plan(spec, formats, context=context, lookahead=lookahead)
    shared = one.memory_bytes - one.bytes_per_request  # a block that a request too short for one does not fill
    return max(0, (memory_bytes - shared) // one.bytes_per_request)


def _one_of_each(schema: CacheSchema) -> dict[str, int]:
    return dataclasses.replace(schema, slots=1, blocks=min(schema.blocks, 1)).bytes_by_component
