"""PrefixSharing: a server's requests go on from what the cache has of their prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv4_jax import Cache, ShardedManager, Transfers, apply_transfers
from dsv4_jax.deepseek_v4.model import Implementation
from dsv4_jax.deepseek_v4.placement import Placement

if TYPE_CHECKING:
    from dsv4_jax.deepseek_v4.serve import Request, Served, StepRecord

_BLOCK = 128
"""Tokens that prompts must begin with alike to share any."""


class PrefixSharing:
    """Looks prompts up, and does what the manager wants done to the cache for it.

    Args:
      manager: of a schema with snapshots.
      placement: of the cache.
      implementation: of the transfers.

    Attributes:
      requests: how many were admitted.
      hits: how many of them did not begin at their prompt's first token.
      copies: of snapshots and blocks, so far.
      bytes_moved: by these.
      compiles: of the program that runs transfers.
    """

    def __init__(self, manager: ShardedManager, placement: Placement, implementation: Implementation) -> None:
        self.requests, self.hits, self.copies, self.bytes_moved, self.compiles = 0, 0, 0, 0, 0
        self._manager = manager

        def run(cache: Cache, transfers: Transfers) -> Cache:
            self.compiles += 1  # runs while tracing
            return apply_transfers(cache, transfers, implementation=implementation)

        self._transfer = placement.program(run)

    def waits(self, request: Request, running: Iterable[Served]) -> bool:
        """Whether a request had better wait: one that is being prefilled may leave what this one begins with."""
        return request.prompt.size > _BLOCK and any(
            not one.decoding
            and one.request.salt == request.salt
            and np.array_equal(one.request.prompt[:_BLOCK], request.prompt[:_BLOCK])
            for one in running
        )

    def admit(self, request: Request) -> int:
        """A handle, whose request has what is known of its prompt once the transfers ran."""
        handle = self._manager.admit(self._manager.match_prefix(request.prompt, salt=request.salt))
        self.requests += 1
        self.hits += self._manager.length(handle) > 0
        return handle

    def transfer(self, cache: Cache) -> Cache:
        """Runs what waits; before the next plan is made."""
        if not self._manager.transfers_wait:
            return cache
        transfers = self._manager.take_transfers()
        copies, size = transfers.copies(self._manager.schema)
        self.copies += copies
        self.bytes_moved += size
        return self._transfer(cache, transfers)


def shared_steps(served: Iterable[Served], tokens: NDArray[np.int32], salt: bytes) -> list[StepRecord]:
    """What was recorded when these tokens, int32 [n], were computed for a request of that salt that began with them.

    Without logits to be judged: they were the other request's.
    """
    for one in served:
        if one.done >= tokens.size and one.request.salt == salt and np.array_equal(one.tokens[: tokens.size], tokens):
            steps = [record for record in one.steps if record.first < tokens.size]
            return [
                record._replace(tokens=min(record.tokens, tokens.size - record.first), judged=0) for record in steps
            ]
    raise LookupError(f"no request of this run has computed these {tokens.size} tokens")
