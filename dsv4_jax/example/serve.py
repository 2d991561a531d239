"""Serve several requests with one cache: admission, chunked prefill, decode, release, until all are done.

A step carries one token of every request that decodes, and fills up with prompt tokens in order of admission. There
are two shapes of step, so two compilations: one token per slot, and a chunk.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from dsv4_jax import CacheFormats, CacheManager, CacheSchema, ModelSpec, StepPlan, init_cache
from dsv4_jax.example.stack import Implementation, step
from dsv4_jax.example.weights import StackWeights

Phase = Literal["prefill", "decode"]

STEPS_IN_FLIGHT = 2
"""Steps sent to the device and not waited for: one runs, one is ready behind it, and an interrupt loses no more."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for."""

    prompt: NDArray[np.int32]
    new_tokens: int
    continuation: NDArray[np.int32] | None = None  # the new tokens, if given ("teacher forcing"); None: greedy


class StepRecord(NamedTuple):
    """What a step returned for one request: parts of the step's arrays, still on the device."""

    first: int  # position of the request's first token of the step
    tokens: int  # how many it brought
    logits: jax.Array  # fp32 [R, 256], the request's in row ``row``
    row: int
    selected: jax.Array  # int32 [CSA layers, T, K], the request's from column ``column``
    column: int


@dataclasses.dataclass
class Served:
    """One request's way through the server."""

    request: Request
    handle: int
    slot: int
    tokens: list[int]  # known so far: the prompt, then one more for each decode step
    done: int = 0  # tokens in the cache
    steps: list[StepRecord] = dataclasses.field(default_factory=list)  # empty unless recording

    @property
    def total(self) -> int:
        """Tokens that the request will have fed to the model."""
        return len(self.request.prompt) + self.request.new_tokens

    @property
    def decoding(self) -> bool:
        """Whether the prompt is behind it."""
        return self.done >= len(self.request.prompt)


@dataclasses.dataclass
class PhaseStatistics:
    """Steps, tokens and wall time of one phase, compile time apart."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """0 before anything ran."""
        return self.tokens / self.seconds if self.seconds else 0.0


def server_schema(spec: ModelSpec, formats: CacheFormats, *, slots: int, max_context: int) -> CacheSchema:
    """The cache of a server: blocks for every slot's whole context, which is rounded up to whole blocks of 128."""
    blocks_per_slot = -(-max_context // 128)
    return CacheSchema(
        spec=spec, formats=formats, slots=slots, blocks=slots * blocks_per_slot, max_context=128 * blocks_per_slot
    )


class Server:
    """A model, its cache and the requests in it.

    Args:
      weights: of the stack.
      spec: of the model.
      formats: how the cache stores.
      slots: requests served at once.
      max_context: the most tokens of a request, rounded up to whole blocks of 128.
      chunk: the most tokens of a step.
      implementation: of the cache operations.
      record: keep every step's logits and selections in ``Served``.
    """

    def __init__(
        self,
        weights: StackWeights,
        spec: ModelSpec,
        formats: CacheFormats,
        *,
        slots: int,
        max_context: int,
        chunk: int,
        implementation: Implementation = "native",
        record: bool = False,
    ) -> None:
        self.schema = server_schema(spec, formats, slots=slots, max_context=max_context)
        self.chunk = max(chunk, slots)
        self.manager = CacheManager(self.schema, token_buckets=(slots, self.chunk))
        self.cache = init_cache(self.schema)
        self.weights = weights
        self.record = record
        self.statistics: dict[Phase, PhaseStatistics] = {"prefill": PhaseStatistics(), "decode": PhaseStatistics()}
        self.compiles: collections.Counter[int] = collections.Counter()  # by token bucket
        self.compile_seconds = 0.0

        def counted(weights, cache, plan, tokens):
            self.compiles[plan.layout.tokens] += 1  # runs while tracing, so once for each compilation
            return step(weights, cache, plan, tokens, spec=spec, implementation=implementation)

        self._step = jax.jit(counted, donate_argnums=1)

    def serve(self, requests: Sequence[Request], progress: Callable[[Phase, int], None] | None = None) -> list[Served]:
        """Run all requests to their end.

        Args:
          requests: any number; those beyond the slots wait for one.
          progress: called after each step with its phase and tokens.

        Returns:
          One ``Served`` for each request, in order.
        """
        waiting = collections.deque(requests)
        running: list[Served] = []
        served: list[Served] = []
        clock = _PhaseClock(self.statistics)
        in_flight: collections.deque[jax.Array] = collections.deque()
        while waiting or running:
            while waiting and self.manager.free_slots:
                handle = self.manager.admit()
                request = waiting.popleft()
                tokens = request.prompt.tolist()
                running.append(Served(request, handle, self.manager.slot(handle), tokens))
                served.append(running[-1])

            counts = self._share(running)
            phase: Phase = "decode" if all(one.decoding for one in running) else "prefill"
            clock.enter(phase, self.cache)
            plan, logits, selected = self._run(running, counts, clock)
            in_flight.append(logits)
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            self._take(running, plan, logits, selected)
            clock.count(sum(counts.values()))
            if progress:
                progress(phase, sum(counts.values()))

            for one in [one for one in running if one.done == one.total]:
                self.manager.release(one.handle)
                running.remove(one)
        clock.leave(self.cache)
        return served

    def _share(self, running: list[Served]) -> dict[int, int]:
        """Tokens of the next step by handle: 1 for each request that decodes, the rest to prompts, oldest first."""
        counts = {one.handle: 1 for one in running if one.decoding}
        left = self.chunk - len(counts)
        for one in running:
            if not one.decoding and left:
                counts[one.handle] = min(left, len(one.request.prompt) - one.done)
                left -= counts[one.handle]
        return counts

    def _run(
        self, running: list[Served], counts: dict[int, int], clock: _PhaseClock
    ) -> tuple[StepPlan, jax.Array, jax.Array]:
        by_handle = {one.handle: one for one in running}
        plan = self.manager.prepare_forward(counts)
        parts = []
        for handle, count in counts.items():
            one = by_handle[handle]
            parts.append(np.asarray(one.tokens[one.done : one.done + count], np.int32))
        compiled, start = self.compiles.total(), time.perf_counter()
        self.cache, logits, selected = self._step(self.weights, self.cache, plan, plan.pack_tokens(parts))
        if self.compiles.total() > compiled:
            elapsed = time.perf_counter() - start
            self.compile_seconds += elapsed
            clock.exclude(elapsed)
        return plan, logits, selected

    def _take(self, running: list[Served], plan: StepPlan, logits: jax.Array, selected: jax.Array) -> None:
        """Give every request of the step what it brought: the next token, and the record."""
        by_slot = {one.slot: one for one in running}
        best = None
        for row in range(np.count_nonzero(plan.request_slot >= 0)):
            one = by_slot[int(plan.request_slot[row])]
            column, count = int(plan.query_start[row]), int(plan.query_start[row + 1] - plan.query_start[row])
            if self.record:
                one.steps.append(StepRecord(one.done, count, logits, row, selected, column))
            one.done += count
            if one.decoding and one.done < one.total:
                new = one.done - len(one.request.prompt)
                if one.request.continuation is None:
                    best = np.asarray(logits).argmax(axis=-1) if best is None else best
                    one.tokens.append(int(best[row]))
                else:
                    one.tokens.append(int(one.request.continuation[new]))


class _PhaseClock:
    """Adds wall time to the phase it was spent in; waits for the device only where the phase changes."""

    def __init__(self, statistics: dict[Phase, PhaseStatistics]) -> None:
        self._statistics = statistics
        self._phase: Phase | None = None
        self._since = 0.0

    def enter(self, phase: Phase, cache: object) -> None:
        if phase != self._phase:
            self.leave(cache)
            self._phase, self._since = phase, time.perf_counter()

    def leave(self, cache: object) -> None:
        if self._phase is not None:
            jax.block_until_ready(cache)
            self._statistics[self._phase].seconds += time.perf_counter() - self._since
            self._phase = None

    def exclude(self, seconds: float) -> None:
        self._since += seconds

    def count(self, tokens: int) -> None:
        if self._phase is not None:
            self._statistics[self._phase].steps += 1
            self._statistics[self._phase].tokens += tokens
