"""What it takes to bring a request of many tokens into the cache, or out of it, without computing it: a prefix hit, a
fork, by host memory, by a file. Beside them the cache's part of computing it again.

Host and device together: from the first call of the manager until every array is where it should be.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from dsv4_jax.cache.pools import Cache, init_cache
from dsv4_jax.cache.transfer import apply_transfers
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.layout.formats import CacheFormats
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops import Implementation
from dsv4_jax.parking.state import RequestState, load_state, preempt, resume, save_state, take_state
from dsv4_jax.spec.kinds import BLOCK_TOKENS
from dsv4_jax.spec.presets import deepseek_v4_flash, tiny_spec
from dsv4_jax.tools.bench.attended_step import attended_inputs, attended_step
from dsv4_jax.tools.bench.measure import Outcome, Timing, spread
from dsv4_jax.tools.bench.step import compile_step, sent
from dsv4_jax.tools.bench.workload import Scale

OPEN_TOKENS = 64
"""Of a request, behind its last full block."""

_SLOTS = 3
_SLOW_TRIALS = 3

Trials = Generator[tuple[Any, int | None] | None, None, None]
"""An operation over and over: yields None when it is ready to be timed, then what to wait for and the bytes it moved.

Bytes are read and written where a copy stays on the device, else those that leave it or come.
"""


class Server:
    """A manager, and a cache of Flash's layers in the default formats with room for three of the longest requests."""

    def __init__(self, scale: Scale) -> None:
        spec = deepseek_v4_flash() if scale.name == "full" else tiny_spec()
        blocks = scale.gather_context // BLOCK_TOKENS + 1
        context = blocks * BLOCK_TOKENS
        self.schema = CacheSchema(spec, CacheFormats(), _SLOTS, _SLOTS * blocks, context, snapshots=2)
        self.manager = CacheManager(self.schema, token_buckets=(scale.chunk, context))
        self.cache: Cache = init_cache(self.schema)
        self.chunk = scale.chunk
        self.compile_seconds = 0.0

    def admit(self, tokens: int) -> int:
        """A request of so many tokens, and a few in an open block, whose plan is as good as run."""
        request = self.manager.admit()
        self.manager.prepare_forward({request: tokens + OPEN_TOKENS})
        return request

    def transfer(self) -> int:
        """Runs the transfers that wait, and says how many bytes they read and write."""
        if not self.manager.transfers_wait:
            return 0
        transfers = self.manager.take_transfers()
        self.cache = _transfer(self.cache, transfers)
        return 2 * transfers.copies(self.schema)[1]

    def remember(self, prompt: NDArray[np.int32]) -> None:
        """Has a prompt in the prefix cache, with a snapshot behind its last full block."""
        request = self.manager.admit(self.manager.match_prefix(prompt))
        while (left := prompt.size - self.manager.length(request)) > 0:
            self.transfer()
            self.manager.commit(
                self.manager.prepare_forward({request: min(left, self.manager.chunk_limit(request))}), 1
            )
        self.transfer()
        self.manager.release(request)

    def state(self, take: Callable[[Cache, CacheManager, int], RequestState], request: int) -> RequestState:
        """A request's, in host memory by the time it returns."""
        state = take(self.cache, self.manager, request)
        jax.block_until_ready((state.slot, state.blocks))
        return state


_transfer = jax.jit(apply_transfers, donate_argnums=0)


def _hit(server: Server, tokens: int) -> Trials:
    prompt = np.arange(tokens + OPEN_TOKENS, dtype=np.int32)
    server.remember(prompt)
    while True:
        yield None
        request = server.manager.admit(server.manager.match_prefix(prompt))
        moved = server.transfer()
        yield server.cache, moved
        if server.manager.length(request) != tokens:
            raise RuntimeError(f"a hit of {server.manager.length(request)} tokens, expected {tokens}")
        server.manager.release(request)


def _fork(server: Server, tokens: int) -> Trials:
    request = server.admit(tokens)
    while True:
        yield None
        twin = server.manager.fork(request)
        moved = server.transfer()
        yield server.cache, moved
        server.manager.release(twin)


def _preempt(server: Server, tokens: int) -> Trials:
    request = server.admit(tokens)
    while True:
        yield None
        state = preempt(server.cache, server.manager, request)
        yield (state.slot, state.blocks), state.nbytes
        request, server.cache = resume(server.cache, server.manager, state)


def _resume(server: Server, tokens: int) -> Trials:
    request = server.admit(tokens)
    while True:
        state = server.state(preempt, request)
        yield None
        request, server.cache = resume(server.cache, server.manager, state)
        yield server.cache, state.nbytes


def _save(server: Server, tokens: int) -> Trials:
    request = server.admit(tokens)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.safetensors"
        while True:
            state = server.state(take_state, request)  # anew: NumPy's views of a state are made once
            yield None
            save_state(file, state)
            yield None, file.stat().st_size


def _load(server: Server, tokens: int) -> Trials:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.safetensors"
        save_state(file, server.state(take_state, server.admit(tokens)))
        while True:
            yield None
            load_state(file)
            yield None, file.stat().st_size


def _recompute(server: Server, tokens: int) -> Trials:
    """The same tokens in chunks: update, index_topk and attend of every layer, and nothing else of a model."""
    manager, example = server.manager, server.manager.admit()
    plan = sent(manager.prepare_forward({example: server.chunk}))
    manager.release(example)
    inputs = attended_inputs(server.schema.spec, plan)
    compiled, _, server.compile_seconds = compile_step(_chunk, server.cache, plan, inputs)
    while True:
        request = manager.admit()
        yield None
        for _ in range(tokens // server.chunk):
            server.cache = compiled(server.cache, manager.prepare_forward({request: server.chunk}), inputs)
        yield server.cache, None
        manager.release(request)


def _chunk(cache: Cache, plan: StepPlan, inputs: Any) -> Cache:
    return attended_step(cache, plan, inputs)


OPERATIONS: dict[str, Callable[[Server, int], Trials]] = {
    "hit": _hit,
    "fork": _fork,
    "preempt": _preempt,
    "resume": _resume,
    "save": _save,
    "load": _load,
    "recompute": _recompute,
}
"""By the case's name, ``life/hit/65536``.

``hit``: a prompt is looked up, admitted, and its snapshot restored. ``fork``: the window, the tails and an open block
are copied. ``preempt`` and ``resume``: to pinned host memory and back, all blocks. ``save`` and ``load``: from host
memory to a file that is on the disk, and back, checksums included. ``recompute``: update, index_topk and attend of all
layers, in chunks of the scale's size, so the least of what the others spare.
"""


def lifecycle(operation: str, tokens: int, scale: Scale, implementation: Implementation) -> Outcome:
    """Microseconds of one of ``OPERATIONS`` on a request of so many tokens.

    ``host_share`` is the part until the last call returned. Remarks: the request's tokens, and layers.
    """
    server = Server(scale)
    count = min(scale.trials, _SLOW_TRIALS) if operation in ("save", "load", "recompute") else scale.trials
    times, shares, moved = [], [], None
    with contextlib.closing(OPERATIONS[operation](server, tokens)) as trials:
        for trial in range(count + 1):
            next(trials)
            jax.block_until_ready(server.cache)
            begin = time.perf_counter()
            made: Any = next(trials)
            returned = time.perf_counter()
            jax.block_until_ready(made[0])
            end = time.perf_counter()
            moved = made[1]
            if trial:  # the first compiles
                times.append((end - begin) * 1e6)
                shares.append((returned - begin) / (end - begin))
    timing = Timing(
        statistics.median(times), spread(times), statistics.median(shares), compile_seconds=server.compile_seconds
    )
    return Outcome(timing, {"tokens": tokens, "layers": len(server.schema.spec.layers)}, moved)
