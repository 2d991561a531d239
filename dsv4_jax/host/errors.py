"""The errors of the host half. Each says what was asked, what is there and what to do; nothing has changed."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4_jax.errors import Picklable


def _shown(values: Sequence[int], limit: int = 8) -> str:
    values = [int(value) for value in values]
    rest = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + rest


class CacheError(Picklable):
    """Base of every error the cache's host half raises."""


class CacheFull(CacheError):
    """Not enough free slots or blocks.

    Attributes:
      resource: "slots" or "blocks".
      needed: how many were asked for.
      free: how many are free.
      total: how many exist.
    """

    def __init__(self, resource: str, needed: int, free: int, total: int) -> None:
        self.resource, self.needed, self.free, self.total = resource, needed, free, total
        remedy = (
            "release a request, or build the schema with more slots"
            if resource == "slots"
            else "release a request, prepare fewer tokens, or build the schema with more blocks"
        )
        super().__init__(f"{needed} {resource} needed, {free} of {total} free: {remedy}")


class UnknownRequest(CacheError):
    """A request handle that was never admitted, or has been released.

    Attributes:
      requests: the unknown handles.
    """

    def __init__(self, requests: Sequence[int]) -> None:
        self.requests = tuple(int(request) for request in requests)
        super().__init__(
            f"not an admitted request: {_shown(self.requests)}; use handles from admit() that were not released since"
        )


class PromptTooLong(CacheError):
    """A request that would exceed the schema's ``max_context``.

    Attributes:
      prompt: its tokens.
      new: those that it may bring at most.
      max_context: the limit.
    """

    def __init__(self, prompt: int, new: int, max_context: int) -> None:
        self.prompt, self.new, self.max_context = int(prompt), int(new), int(max_context)
        super().__init__(
            f"{self.prompt} tokens and {self.new} new ones do not fit a context of {self.max_context}: give fewer, or "
            "build the schema with a larger max_context"
        )


class LengthUnknown(CacheError):
    """A request whose length the host does not know, since it has not heard what became of its drafts.

    Attributes:
      request: handle.
    """

    def __init__(self, request: int, wanted: str) -> None:
        self.request = int(request)
        super().__init__(
            f"request {self.request} cannot be {wanted}: how many of its drafts were kept is not known; commit their "
            "plans first"
        )


class NothingCached(CacheError):
    """A prompt of which the cache has nothing that could be kept.

    Attributes:
      tokens: how many it has.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = int(tokens)
        super().__init__(
            f"nothing of these {self.tokens} tokens is cached up to a snapshot: compute them, and match_prefix again"
        )


class TransfersWait(CacheError):
    """A step is to be planned while transfers wait that must run before it.

    Attributes:
      count: how many wait.
    """

    def __init__(self, count: int) -> None:
        self.count = int(count)
        super().__init__(
            f"{self.count} transfers wait that must run before the next step: "
            "cache = apply_transfers(cache, manager.take_transfers()), then prepare it"
        )


class InvalidStep(CacheError):
    """A step that no cache could run, or could have run: a request twice, a count out of range, no such integers."""


class ContextExceeded(CacheError):
    """A request would grow beyond the schema's ``max_context``.

    Attributes:
      request: the first such request.
      length: its length.
      count: the tokens asked for.
      max_context: the limit.
    """

    def __init__(self, request: int, length: int, count: int, max_context: int) -> None:
        self.request, self.length = int(request), int(length)
        self.count, self.max_context = int(count), int(max_context)
        super().__init__(
            f"request {self.request} holds {self.length} tokens and asks for {self.count} more, the context is "
            f"{self.max_context}: give it at most {self.max_context - self.length}, release it, or build the schema "
            "with a larger max_context"
        )


class StepTooLarge(CacheError):
    """More tokens in a step than the largest token bucket.

    Attributes:
      tokens: how many were asked for.
      limit: the largest bucket.
    """

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens, self.limit = int(tokens), int(limit)
        super().__init__(
            f"{self.tokens} tokens in one step, the largest token bucket is {self.limit}: "
            "split the step (any chunking gives the same cache) or add a larger bucket"
        )


class StalePlan(CacheError):
    """A plan that cannot be cancelled or committed: was already, is not its requests' latest, or another manager's."""


class CannotTruncate(CacheError):
    """The state of the length asked for is no longer on the device, or never was.

    Attributes:
      request: the request.
      length: its length.
      target: the length asked for.
      lowest: the lowest length above 0 from which on every length up to ``length`` is possible; 0 is possible always.
    """

    def __init__(self, request: int, length: int, target: int, lowest: int, reason: str) -> None:
        self.request, self.length, self.target, self.lowest = int(request), int(length), int(target), int(lowest)
        super().__init__(
            f"request {self.request} of length {self.length} cannot be truncated to {self.target}: {reason}; "
            f"possible are 0 and {self.lowest} to {self.length}"
        )
