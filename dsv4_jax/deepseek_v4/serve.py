"""Serve several requests with one cache: admission, chunked prefill, decode, release, until all are done.

A step carries one token of every request that decodes, with guesses of those that follow if there are any, and fills up
with prompt tokens in order of admission. Its shapes are those of the plan's layout, and each layout that comes is
compiled once: the tokens that all slots together decode, and a chunk.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import NDArray

from dsv4_jax import Cache, CacheFormats, CacheSchema, ModelSpec, PlanLayout, ShardedManager, ShardedPlan, StepPlan
from dsv4_jax.deepseek_v4.attention import Attention
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.drafters import Drafter, PromptLookup
from dsv4_jax.deepseek_v4.model import Choices, Implementation, last_tokens, step
from dsv4_jax.deepseek_v4.phases import Phase, PhaseClock, PhaseStatistics
from dsv4_jax.deepseek_v4.placement import DATA, Placement
from dsv4_jax.deepseek_v4.sampling import Sampling, next_tokens
from dsv4_jax.deepseek_v4.sharing import PrefixSharing, shared_steps
from dsv4_jax.deepseek_v4.speculation import NO_DRAFTS, Speculation
from dsv4_jax.deepseek_v4.weights import ModelWeights

STEPS_IN_FLIGHT = 2
"""Steps sent to the device and not waited for: one runs, one is ready behind it, and an interrupt loses no more."""
SNAPSHOTS_PER_SLOT = 2
"""Where prefixes are shared: at the end of a prompt, and where it stopped being like those before it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
      prompt: int32 [n], n at least 1.
      new_tokens: how many follow, or fewer where the model ends the text.
      continuation: int32 [new_tokens], the tokens that follow, if given ("teacher forcing"); None: the model's own.
      seed: of what is drawn, 0 .. 2^32 - 1.
      salt: where prefixes are shared, only with requests of the same salt: a tenant's, say.
    """

    prompt: NDArray[np.int32]
    new_tokens: int
    continuation: NDArray[np.int32] | None = None
    seed: int = 0
    salt: bytes = b""


class StepRecord(NamedTuple):
    """What a step returned for one request: parts of the step's arrays, still on the device."""

    # With several shards, rows and columns are those of all of them, side by side.
    first: int  # position of the request's first token of the step
    tokens: int  # how many it brought, and kept
    logits: jax.Array  # fp32 [N, vocabulary], those after the last of these tokens in row ``row``
    row: int
    choices: Choices  # of all tokens [.., T, ..], the request's from column ``column``
    column: int
    judged: int = 1  # so many of the tokens, the last ones, have logits, in as many rows up to ``row``


@dataclasses.dataclass
class Served:
    """One request's way through the server."""

    number: int  # its place among the requests
    request: Request
    handle: int
    shard: int
    slot: int  # of the shard
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

    chosen: jax.Array  # int32 [N], as the logits' rows
    logits: jax.Array  # fp32 [N, vocabulary], N = R (1 + drafts of a request at most): see ``last_tokens``
    choices: Choices


class Listener(Protocol):
    """Is told what happens while requests are served."""

    def ran(self, phase: Phase, tokens: int) -> None:
        """A step of so many tokens was sent to the device; drafts count that were kept."""
        ...

    def found(self, number: int, tokens: int) -> None:
        """So many tokens of a request's prompt were in the cache and need not run."""
        ...

    def chose(self, number: int, token: int) -> None:
        """The model chose a new token of a request."""
        ...

    def ended(self, number: int) -> None:
        """A request is done."""
        ...


def server_schema(
    spec: ModelSpec,
    formats: CacheFormats,
    *,
    slots: int,
    max_context: int,
    share_prefix: bool = False,
    speculate: int = 0,
) -> CacheSchema:
    """The cache of a server: blocks for every slot's whole context, which is rounded up to whole blocks of 128."""
    blocks_per_slot = -(-max_context // 128)
    return CacheSchema(
        spec=spec,
        formats=formats,
        slots=slots,
        blocks=slots * blocks_per_slot,
        max_context=128 * blocks_per_slot,
        lookahead=speculate,
        snapshots=SNAPSHOTS_PER_SLOT * slots * share_prefix,
    )


class Server:
    """A model, its cache and the requests in it.

    Args:
      config: of the model.
      weights: likewise.
      formats: how the cache stores.
      slots: requests served at once, in each shard.
      max_context: the most tokens of a request, rounded up to whole blocks of 128.
      chunk: the most tokens of a step, in each shard; at least those that all its slots together decode.
      sampling: how the model's own tokens are chosen.
      implementation: of the cache operations.
      attention: how rows are attended to.
      dtype: of activations.
      record: keep every step's logits and choices in ``Served``. Nothing is then shared with an earlier ``serve``.
      share_prefix: whether requests go on from what the cache has of their prompts.
      speculate: drafts that a request brings in a step at most, beside the token it goes on with; 0 for none. A draft
        is kept where it is the token that would have come without, drawn or not, so texts are the same; but for
        rounding, since steps of another shape add in another order.
      drafter: who guesses them.
      mesh: several devices, from ``server_mesh``: shards of the cache along its axis "data", query heads and experts
        split over its axis "tensor". Weights that do not lie as ``weight_sharding`` has it are moved.

    Attributes:
      prefixes: what was shared, None if nothing is.
      speculation: what came of the drafts.
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
        share_prefix: bool = False,
        speculate: int = 0,
        drafter: Drafter = PromptLookup(),  # noqa: B008 - frozen
        mesh: Mesh | None = None,
    ) -> None:
        self.placement = Placement(mesh)
        self.config, self.weights, self.dtype = config, self.placement.weights(config, weights), dtype
        self.speculation, together = Speculation(drafter, speculate), 1 + speculate
        shapes = {"slots": slots, "max_context": max_context}
        self.schema = server_schema(config.spec, formats, **shapes, share_prefix=share_prefix, speculate=speculate)
        self.chunk = max(chunk, slots * together)
        buckets = slots * together, self.chunk
        self.manager = ShardedManager(self.schema, self.placement.shards, token_buckets=buckets)
        self.prefixes = PrefixSharing(self.manager, self.placement, implementation) if share_prefix else None
        self.cache = self.placement.cache(self.schema)
        self.record = record
        self.statistics: dict[Phase, PhaseStatistics] = {"prefill": PhaseStatistics(), "decode": PhaseStatistics()}
        self.compiles: collections.Counter[PlanLayout] = collections.Counter()
        self.compile_seconds = 0.0

        def run(  # of a shard, on one device
            cache: Cache, plan: StepPlan, weights: ModelWeights, tokens: jax.Array, seeds: jax.Array
        ) -> tuple[Cache, jax.Array, jax.Array, Choices]:
            self.compiles[plan.layout] += 1  # runs while tracing, so once for each compilation
            cache, logits, choices = step(
                weights,
                cache,
                plan,
                tokens,
                config=config,
                implementation=implementation,
                attention=attention,
                dtype=dtype,
                last=together,
                tensor_axis=self.placement.tensor_axis,
            )
            positions = jnp.asarray(plan.token_position)[last_tokens(plan, together)]
            return cache, next_tokens(logits, jnp.repeat(seeds, together), positions, sampling), logits, choices

        of_requests, of_tokens = PartitionSpec(DATA), PartitionSpec(None, DATA)
        self._step = self.placement.program(
            run,
            in_specs=(self.placement.weight_specs(config, self.weights), PartitionSpec(DATA), of_requests),
            out_specs=(of_requests, of_requests, of_tokens),
        )

    def serve(self, requests: Sequence[Request], listener: Listener | None = None) -> list[Served]:
        """Run all requests to their end.

        Args:
          requests: any number; those beyond the slots wait for one.
          listener: is told what happens.

        Returns:
          One ``Served`` for each request, in order.
        """
        if self.record and self.prefixes:
            self.manager.reset_prefix_cache()
        waiting = collections.deque(enumerate(requests))
        running: dict[int, Served] = {}  # by handle
        served: list[Served] = []
        clock = PhaseClock(self.statistics)
        in_flight: collections.deque[jax.Array] = collections.deque()
        while waiting or running:
            while waiting and self.manager.free_slots:
                if self.prefixes and self.prefixes.waits(waiting[0][1], running.values()):
                    break
                one = self._admit(*waiting.popleft(), served)
                served.append(one)
                running[one.handle] = one
                if listener and one.done:
                    listener.found(one.number, one.done)
            phase: Phase = "decode" if all(one.decoding for one in running.values()) else "prefill"
            clock.enter(phase, self.cache)
            drafts = self._drafts(running)
            counts = self._share(running, drafts)
            plan, made = self._run(running, counts, drafts, clock)
            in_flight.append(made.chosen)
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            starts = {handle: running[handle].done for handle in counts}
            places = zip(plan.rows.tolist(), plan.columns.tolist(), strict=True)
            for (handle, count), (row, column) in zip(counts.items(), places, strict=True):
                self._take(running[handle], count, drafts.get(handle, NO_DRAFTS), row, column, made, listener)
            kept = sum(running[handle].done - start for handle, start in starts.items())
            clock.count(kept)
            if listener:
                listener.ran(phase, kept)
            if self.prefixes or drafts:
                self._settle(plan, running, starts)
            for handle in counts:
                if (one := running[handle]).done == one.total:
                    self.manager.release(handle)
                    self.speculation.forget(handle)
                    del running[handle]
                    if listener:
                        listener.ended(one.number)
        clock.leave(self.cache)
        return served

    def _admit(self, number: int, request: Request, served: Sequence[Served]) -> Served:
        handle = self.prefixes.admit(request) if self.prefixes else self.manager.admit()
        total, done = len(request.prompt) + request.new_tokens, self.manager.length(handle)
        shard, local = self.manager.place(handle)
        slot, tokens = self.manager.managers[shard].slot(local), request.prompt.tolist()
        one = Served(number, request, handle, shard, slot, total, tokens, done)
        if self.record and done:
            one.steps += shared_steps(served, request.prompt[:done], request.salt)
        return one

    def _drafts(self, running: Mapping[int, Served]) -> dict[int, NDArray[np.int32]]:
        """By handle, int32 [n]: guesses of what follows, where there are any."""
        if not self.speculation.most:
            return {}
        guessed = {
            handle: self.speculation.drafts(handle, one.tokens, one.total)
            for handle, one in running.items()
            if one.decoding
        }
        return {handle: drafts for handle, drafts in guessed.items() if drafts.size}

    def _share(self, running: Mapping[int, Served], drafts: Mapping[int, NDArray[np.int32]]) -> dict[int, int]:
        """Tokens of the next step by handle: 1 and its drafts for each that decodes, the rest to prompts, oldest first.

        Where prefixes are shared, a prompt's part ends where a snapshot is worth its place.
        """
        counts = {handle: 1 + drafts.get(handle, NO_DRAFTS).size for handle, one in running.items() if one.decoding}
        left = [self.chunk] * self.placement.shards
        for handle, count in counts.items():
            left[running[handle].shard] -= count
        for handle, one in running.items():
            if not one.decoding and left[one.shard]:
                wanted = len(one.request.prompt) - one.done
                if self.prefixes:
                    wanted = min(wanted, self.manager.chunk_limit(handle))
                counts[handle] = min(left[one.shard], wanted)
                left[one.shard] -= counts[handle]
        return counts

    def _run(
        self,
        running: Mapping[int, Served],
        counts: Mapping[int, int],
        drafts: Mapping[int, NDArray[np.int32]],
        clock: PhaseClock,
    ) -> tuple[ShardedPlan, _Made]:
        """Send one step to the device; the plan's requests are in the order of ``counts``."""
        compiled, start = self._compiled(), time.perf_counter()
        if self.prefixes:
            self.cache = self.prefixes.transfer(self.cache)
        guessed = {handle: some.size for handle, some in drafts.items()}
        plan = self.manager.prepare_forward(counts, drafts=guessed or None)
        parts, seeds = [], np.zeros(self.placement.shards * plan.layout.requests, np.uint32)
        for row, (handle, count) in zip(plan.rows.tolist(), counts.items(), strict=True):
            one = running[handle]
            certain = np.asarray(one.tokens[one.done : one.done + count], np.int32)
            parts.append(np.concatenate([certain, drafts.get(handle, NO_DRAFTS)]))
            seeds[row] = one.request.seed
        self.cache, *made = self._step(self.cache, plan.step_plan, self.weights, plan.pack_tokens(parts), seeds)
        if self._compiled() > compiled:
            elapsed = time.perf_counter() - start
            self.compile_seconds += elapsed
            clock.exclude(elapsed)
        return plan, _Made(*made)

    def _compiled(self) -> int:
        return self.compiles.total() + (self.prefixes.compiles if self.prefixes else 0)

    def _take(
        self,
        one: Served,
        count: int,
        drafts: NDArray[np.int32],
        row: int,
        column: int,
        made: _Made,
        listener: Listener | None,
    ) -> None:
        """Give a request what the step brought it: the record, its next token, and one for each draft that is kept.

        A draft is kept if it is the token that came next, and so is what the model then said after it.
        """
        first, kept = one.done, 0
        place = (row + 1) * (1 + self.speculation.most) - 1 - drafts.size  # of what follows the last token but drafts
        one.done += count - drafts.size
        while self._next(one, place + kept, made, listener) and kept < drafts.size and one.tokens[-1] == drafts[kept]:
            kept += 1
            one.done += 1
        self.speculation.count(drafts.size, kept)
        if self.record:
            record = one.done - first, made.logits, place + kept, made.choices, column, 1 + kept
            one.steps.append(StepRecord(first, *record))

    def _next(self, one: Served, place: int, made: _Made, listener: Listener | None) -> bool:
        """Adds the token that follows those done, if one is to be fed, and tells whether."""
        if not one.decoding or one.done == one.total:
            return False
        if one.request.continuation is not None:
            one.tokens.append(int(one.request.continuation[one.done - len(one.request.prompt)]))
            return True
        token = int(np.asarray(made.chosen)[place])
        one.tokens.append(token)
        if token in self.config.end_tokens:
            one.total = one.done
            return False
        if listener:
            listener.chose(one.number, token)
        return True

    def _settle(self, plan: ShardedPlan, running: Mapping[int, Served], starts: Mapping[int, int]) -> None:
        """Tell the manager how far each request of a step came, and with which tokens if others are to share them."""
        ends = [running[handle].done for handle in starts]
        tokens = None
        if self.prefixes:
            kept = zip(starts.items(), ends, strict=True)
            tokens = [np.asarray(running[handle].tokens[start:end], np.int32) for (handle, start), end in kept]
        self.manager.commit(plan, lengths=np.asarray(ends), tokens=tokens)
