"""Serve several requests with one cache: admission, chunked prefill, decode, release, until all are done.

A step carries one token of every request that decodes, and fills up with prompt tokens in order of admission. Its
shapes are those of the plan's layout, and each layout that comes is compiled once: one token per slot, and a chunk.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dsv4_jax import CacheFormats, CacheManager, CacheSchema, ModelSpec, PlanLayout, StepPlan, init_cache
from dsv4_jax.deepseek_v4.attention import Attention
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.model import Choices, Implementation, step
from dsv4_jax.deepseek_v4.sampling import Sampling, next_tokens
from dsv4_jax.deepseek_v4.weights import ModelWeights

Phase = Literal["prefill", "decode"]

STEPS_IN_FLIGHT = 2
"""Steps sent to the device and not waited for: one runs, one is ready behind it, and an interrupt loses no more."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
      prompt: int32 [n], n at least 1.
      new_tokens: how many follow, or fewer where the model ends the text.
      continuation: int32 [new_tokens], the tokens that follow, if given ("teacher forcing"); None: the model's own.
      seed: of what is drawn, 0 .. 2^32 - 1.
    """

    prompt: NDArray[np.int32]
    new_tokens: int
    continuation: NDArray[np.int32] | None = None
    seed: int = 0


class StepRecord(NamedTuple):
    """What a step returned for one request: parts of the step's arrays, still on the device."""

    first: int  # position of the request's first token of the step
    tokens: int  # how many it brought
    logits: jax.Array  # fp32 [R, vocabulary], the request's in row ``row``
    row: int
    choices: Choices  # of all tokens [.., T, ..], the request's from column ``column``
    column: int


@dataclasses.dataclass
class Served:
    """One request's way through the server."""

    number: int  # its place among the requests
    request: Request
    handle: int
    slot: int
    total: int  # tokens that it will have fed to the model
    tokens: list[int]  # known so far: the prompt, then one more for each decode step
    done: int = 0  # tokens in the cache
    steps: list[StepRecord] = dataclasses.field(default_factory=list)  # empty unless recording

    @property
    def decoding(self) -> bool:
        """Whether the prompt is behind it."""
        return self.done >= len(self.request.prompt)


class _Made(NamedTuple):
    """What a step returns beside the cache."""

    chosen: jax.Array  # int32 [R]
    logits: jax.Array  # fp32 [R, vocabulary]
    choices: Choices


class Listener(Protocol):
    """Is told what happens while requests are served."""

    def ran(self, phase: Phase, tokens: int) -> None:
        """A step of so many tokens was sent to the device."""
        ...

    def chose(self, number: int, token: int) -> None:
        """The model chose a new token of a request."""
        ...

    def ended(self, number: int) -> None:
        """A request is done."""
        ...


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
      config: of the model.
      weights: likewise.
      formats: how the cache stores.
      slots: requests served at once.
      max_context: the most tokens of a request, rounded up to whole blocks of 128.
      chunk: the most tokens of a step.
      sampling: how the model's own tokens are chosen.
      implementation: of the cache operations.
      attention: how rows are attended to.
      dtype: of activations.
      record: keep every step's logits and choices in ``Served``.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        weights: ModelWeights,
        formats: CacheFormats,
        *,
        slots: int,
        max_context: int,
        chunk: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        implementation: Implementation = "native",
        attention: Attention = "attend",
        dtype: Any = jnp.bfloat16,
        record: bool = False,
    ) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.schema = server_schema(config.spec, formats, slots=slots, max_context=max_context)
        self.chunk = max(chunk, slots)
        self.manager = CacheManager(self.schema, token_buckets=(slots, self.chunk))
        self.cache = init_cache(self.schema)
        self.record = record
        self.statistics: dict[Phase, PhaseStatistics] = {"prefill": PhaseStatistics(), "decode": PhaseStatistics()}
        self.compiles: collections.Counter[PlanLayout] = collections.Counter()
        self.compile_seconds = 0.0

        def run(weights, cache, plan, tokens, seeds):
            self.compiles[plan.layout] += 1  # runs while tracing, so once for each compilation
            options = {"implementation": implementation, "attention": attention, "dtype": dtype}
            cache, logits, choices = step(weights, cache, plan, tokens, config=config, **options)
            positions = jnp.asarray(plan.token_position)[plan.last_token]
            return cache, next_tokens(logits, seeds, positions, sampling), logits, choices

        self._step = jax.jit(run, donate_argnums=1)

    def serve(self, requests: Sequence[Request], listener: Listener | None = None) -> list[Served]:
        """Run all requests to their end.

        Args:
          requests: any number; those beyond the slots wait for one.
          listener: is told what happens.

        Returns:
          One ``Served`` for each request, in order.
        """
        waiting = collections.deque(enumerate(requests))
        running: dict[int, Served] = {}  # by handle
        served: list[Served] = []
        clock = _PhaseClock(self.statistics)
        in_flight: collections.deque[jax.Array] = collections.deque()
        while waiting or running:
            while waiting and self.manager.free_slots:
                served.append(self._admit(*waiting.popleft()))
                running[served[-1].handle] = served[-1]
            counts = self._share(running)
            phase: Phase = "decode" if all(one.decoding for one in running.values()) else "prefill"
            clock.enter(phase, self.cache)
            plan, made = self._run(running, counts, clock)
            in_flight.append(made.chosen)
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            clock.count(sum(counts.values()))
            if listener:
                listener.ran(phase, sum(counts.values()))
            for row, handle in enumerate(counts):
                one = running[handle]
                self._take(one, counts[handle], row, int(plan.query_start[row]), made, listener)
                if one.done == one.total:
                    self.manager.release(handle)
                    del running[handle]
                    if listener:
                        listener.ended(one.number)
        clock.leave(self.cache)
        return served

    def _admit(self, number: int, request: Request) -> Served:
        handle = self.manager.admit()
        total = len(request.prompt) + request.new_tokens
        return Served(number, request, handle, self.manager.slot(handle), total, request.prompt.tolist())

    def _share(self, running: Mapping[int, Served]) -> dict[int, int]:
        """Tokens of the next step by handle: 1 for each request that decodes, the rest to prompts, oldest first."""
        counts = {handle: 1 for handle, one in running.items() if one.decoding}
        left = self.chunk - len(counts)
        for handle, one in running.items():
            if not one.decoding and left:
                counts[handle] = min(left, len(one.request.prompt) - one.done)
                left -= counts[handle]
        return counts

    def _run(self, running: Mapping[int, Served], counts: dict[int, int], clock: _PhaseClock) -> tuple[StepPlan, _Made]:
        """Send one step to the device; the requests' rows are in the order of ``counts``."""
        plan = self.manager.prepare_forward(counts)
        parts, seeds = [], np.zeros(plan.layout.requests, np.uint32)
        for row, (handle, count) in enumerate(counts.items()):
            one = running[handle]
            parts.append(np.asarray(one.tokens[one.done : one.done + count], np.int32))
            seeds[row] = one.request.seed
        compiled, start = self.compiles.total(), time.perf_counter()
        self.cache, *made = self._step(self.weights, self.cache, plan, plan.pack_tokens(parts), seeds)
        if self.compiles.total() > compiled:
            elapsed = time.perf_counter() - start
            self.compile_seconds += elapsed
            clock.exclude(elapsed)
        return plan, _Made(*made)

    def _take(self, one: Served, count: int, row: int, column: int, made: _Made, listener: Listener | None) -> None:
        """Give a request what the step brought it: the record, and the next token, which may end the text."""
        if self.record:
            one.steps.append(StepRecord(one.done, count, made.logits, row, made.choices, column))
        one.done += count
        if not one.decoding or one.done == one.total:
            return
        if one.request.continuation is not None:
            one.tokens.append(int(one.request.continuation[one.done - len(one.request.prompt)]))
            return
        token = int(np.asarray(made.chosen)[row])
        one.tokens.append(token)
        if token in self.config.end_tokens:
            one.total = one.done
        elif listener:
            listener.chose(one.number, token)


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
