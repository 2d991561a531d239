"""What cases run on: sizes, noise, a filled cache, plans, projections; and `Workload`, an op ready to be timed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache.pools import Cache
from dsv4_jax.cache.rotary import closing_rotary, token_rotary
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import CacheFormats
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.layout.schema import TABLES, CacheSchema
from dsv4_jax.ops.operands import CompressorInputs, RawRows
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM, KEY_DIM, LayerKind, entries_per_block
from dsv4_jax.spec.model import LayerSpec, ModelSpec
from dsv4_jax.spec.presets import deepseek_v4_pro
from dsv4_jax.tools.bench.stored import filled_pool, filled_window
from dsv4_jax.tools.bench.traffic import StepShape

FORMATS = CacheFormats(entries="fp8", window="fp8", keys="nvfp4")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the cases are.

    Attributes:
      name: "full", or "tiny" for a machine that can only check that all runs.
      batches: requests of a decode step.
      layers: layers in a pool. A timed program uses each pair of layer and plan at most once, so that it finds every
        page cold, as a decode step does; so do the next two.
      plans: different sets of slots.
      calls: calls in the shorter of the two timed programs, the longer one has twice as many.
      context: the most tokens of a decoding request.
      prefill: tokens of a prefill step.
      prefill_requests: how many requests bring them, in the case of many.
      queries: queries of a gather.
      chosen: entries that each of them reads.
      gather_context: tokens of each slot that is gathered from.
      heads: of attention; the first is Flash's and takes half as many entries as are chosen, the second is Pro's.
      index_heads: of the indexer.
      read_batches: requests of a decode step that attends or chooses entries.
      long_batches: the same, of the longest contexts.
      long_context: tokens of those.
      chunk: tokens of a prefill step that attends or chooses entries behind `gather_context` tokens.
      rows: rows of `quantize` and `dequantize`.
      scratch_bytes: what is written before each replay to evict the L2 cache.
      copy_bytes: the array copied and read to find the speed of memory.
      matmul_size: rows and columns of the matrices multiplied to find the speed of products.
      trial_seconds: what one timing of a program should take.
      trials: timings of each program.
      step_requests: requests of the whole decode step, writes alone.
      step_batches: requests of the whole decode step with its reads.
      model_batches: requests of the whole model's decode step.
      model_contexts: tokens of each of them.
      host_requests: requests that `prepare_forward` plans.
    """

    name: str
    batches: tuple[int, ...]
    layers: int
    plans: int
    calls: int
    context: int
    prefill: int
    prefill_requests: int
    queries: tuple[int, ...]
    chosen: int
    gather_context: int
    heads: tuple[int, ...]
    index_heads: int
    read_batches: tuple[int, ...]
    long_batches: tuple[int, ...]
    long_context: int
    chunk: int
    rows: int
    scratch_bytes: int
    copy_bytes: int
    matmul_size: int
    trial_seconds: float
    trials: int
    step_requests: int
    step_batches: tuple[int, ...]
    model_batches: tuple[int, ...]
    model_contexts: tuple[int, ...]
    host_requests: int

    def __post_init__(self) -> None:
        if self.layers * self.plans < 2 * self.calls:
            raise ValueError(f"{2 * self.calls} calls need as many pairs of layer and plan")


FULL = Scale(
    name="full",
    batches=(1, 8, 64, 256),
    layers=32,
    plans=4,
    calls=64,
    context=512,
    prefill=8192,
    prefill_requests=8,
    queries=(64, 256),
    chosen=1024,
    gather_context=65_536,
    heads=(64, 128, 32, 16, 8),
    index_heads=64,
    read_batches=(1, 8, 64, 256),
    long_batches=(1, 8, 64),
    long_context=1_048_576,
    chunk=2048,
    rows=16_384,
    scratch_bytes=2**29,
    copy_bytes=2**30,
    matmul_size=8192,
    trial_seconds=0.008,
    trials=11,
    step_requests=64,
    step_batches=(1, 8, 64),
    model_batches=(1, 8, 64),
    model_contexts=(4096, 65_536),
    host_requests=1024,
)
TINY = Scale(
    name="tiny",
    batches=(1, 4),
    layers=2,
    plans=2,
    calls=2,
    context=256,
    prefill=256,
    prefill_requests=2,
    queries=(2,),
    chosen=16,
    gather_context=512,
    heads=(2, 4),
    index_heads=2,
    read_batches=(2,),
    long_batches=(1,),
    long_context=1024,
    chunk=16,
    rows=8,
    scratch_bytes=2**10,
    copy_bytes=2**22,
    matmul_size=64,
    trial_seconds=0.0,
    trials=2,
    step_requests=2,
    step_batches=(2,),
    model_batches=(2,),
    model_contexts=(256,),
    host_requests=8,
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One op, ready to be called over and over in one program.

    Attributes:
      key: workloads of one key can share what `state` makes.
      state: makes the arrays that the calls update in place; None if there are none.
      call: (state, gate, operands, layer) -> (state, result). The result is None where the state keeps the call alive,
        as it does every native op that it is threaded through; else an array, which is then computed in full.
      gates: for each set of operands the plan or int32 array that tells the op what to do; a program makes it wait
        until the L2 cache is evicted. None: nothing is evicted.
      operands: for each set, what else the op reads.
      layers: the layers that calls go round.
      calls: see ``Scale``.
      bytes_moved: the fewest bytes of one call, on average over the sets.
      operations: the fewest operations of its matrix products, likewise: a multiplication and an addition each, those
        of 8-bit numbers half, since tensor cores multiply them twice as fast as bfloat16.
      reads: whether the bytes are read for the most part, and so held to the speed of reading instead of copying.
    """

    key: Hashable
    state: Callable[[], Any]
    call: Callable[..., tuple[Any, Any]]
    gates: Sequence[Any] | None
    operands: Sequence[Any]
    layers: int
    calls: int
    bytes_moved: int
    operations: int = 0
    reads: bool = False


def noise(shape: Sequence[int], dtype: Any, seed: int = 0) -> jax.Array:
    """Pseudo-random numbers in [-1, 1), or bytes below 64, which no format reads as NaN or infinity.

    Made from the index by one fused kernel without temporaries, whatever the size.
    """
    return _noise(tuple(shape), jnp.dtype(dtype), np.uint32(seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noise(shape: tuple[int, ...], dtype: np.dtype, seed: jax.Array) -> jax.Array:
    value = jnp.zeros(shape, jnp.uint32) + (seed + 1) * jnp.uint32(0x9E3779B9)
    for axis in range(len(shape)):
        value = (value + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x85EBCA6B)
        value = value ^ (value >> 15)
    if jnp.issubdtype(dtype, jnp.integer):
        return (value >> 10 & 63).astype(dtype)
    return ((value >> 8).astype(jnp.float32) * np.float32(2**-23) - 1).astype(dtype)


def model_of(kind: LayerKind, layers: int) -> ModelSpec:
    """DeepSeek-V4-Pro's geometry with layers of one kind only."""
    pro = deepseek_v4_pro(include_mtp=True)
    of_kind = next(layer for layer in pro.layers if layer.kind is kind)
    return dataclasses.replace(
        pro, name=f"{layers} {kind.name} layers", layers=(LayerSpec(kind, of_kind.rope),) * layers
    )


def schema_of(spec: ModelSpec, slots: int, context: int, hca_tail: str = "rows", lookahead: int = 0) -> CacheSchema:
    """A schema in which every slot has blocks for its whole context."""
    formats = dataclasses.replace(FORMATS, hca_tail=hca_tail)
    return CacheSchema(spec, formats, slots, slots * -(-context // BLOCK_TOKENS), context, lookahead)


def block_table(slots: int, blocks_per_slot: int) -> np.ndarray:
    """Blocks of every slot, scattered over the pool."""
    order = np.random.default_rng(0).permutation(slots * blocks_per_slot)
    return order.reshape(slots, blocks_per_slot).astype(np.int32)


def noisy_cache(schema: CacheSchema) -> Cache:
    """A cache full of random rows as they are stored, tails of noise, blocks for the whole context of each slot."""
    table, formats, arrays = block_table(schema.slots, schema.max_blocks), schema.formats, {}
    by_component = {"entries": formats.entry_format, "keys": formats.key_format}
    for seed, (name, array) in enumerate(schema.arrays.items()):
        if name in TABLES:
            arrays[name] = jnp.array(table)
        elif name == "window":
            arrays[name] = filled_window(formats.window_format, schema.ring, array.shape[0], schema.slots)
        elif name in schema.block_pools:
            kind, component = name.split("_")
            rows = entries_per_block(LayerKind(kind).ratio)
            arrays[name] = filled_pool(by_component[component], rows, array.shape[0], table)
        else:
            arrays[name] = noise(array.shape, array.dtype, seed)
    pools = {name: arrays[name] for name in schema.pools}
    shared: dict[str, Any] = {name: array for name, array in arrays.items() if name not in pools}
    return Cache(**shared, pools=pools, schema=schema)


def plan_of(shape: StepShape, slots: np.ndarray) -> StepPlan:
    """The plan of a step, on the device; nothing is reset, and no displaced row is saved."""
    layout = PlanLayout(shape.tokens, len(shape.starts), displaces=False)
    plan = build_plan(layout, slots, shape.starts, shape.counts, np.zeros(layout.requests, bool))
    return StepPlan(jnp.asarray(plan.packed), plan.layout)


def slot_sets(slots: int, batch: int, sets: int) -> list[np.ndarray]:
    """Disjoint sets of slots, scattered."""
    order = np.random.default_rng(1).permutation(slots)
    return [order[i * batch : (i + 1) * batch] for i in range(sets)]


def admit(manager: CacheManager, lengths: Iterable[int]) -> np.ndarray:
    """Requests of these lengths, whose plans are as good as run: int64 [requests], their handles."""
    handles = []
    for length in lengths:
        handles.append(manager.admit())
        manager.prepare_forward({handles[-1]: int(length)})
    return np.array(handles)


def compressor_inputs(plan: StepPlan, spec: LayerSpec, width: int, dtype: Any, seed: int) -> CompressorInputs:
    """Projections and weights of a compressor (width 512) or indexer (128); angles computed here, outside the op."""
    columns = width * (2 if spec.kind is LayerKind.CSA else 1)
    tokens = plan.layout.tokens
    return CompressorInputs(
        noise((tokens, columns), dtype, seed),
        noise((tokens, columns), dtype, seed + 1),
        noise((spec.kind.ratio, columns), jnp.float32, seed + 2),
        noise((width,), jnp.float32, seed + 3),
        jax.jit(closing_rotary, static_argnums=(1, 2))(plan, spec.kind.ratio, spec.rope),
    )


def update_inputs(plan: StepPlan, spec: LayerSpec, dtype: Any, seed: int = 0) -> tuple[Any, ...]:
    """What ``LayerCache.update`` takes: raw bf16 window rows, compressor and indexer inputs as the kind needs."""
    angles = jax.jit(token_rotary, static_argnums=1)(plan, spec.rope)
    rows = RawRows(
        noise((plan.layout.tokens, HEAD_DIM), jnp.bfloat16, seed + 8), noise((HEAD_DIM,), jnp.float32), angles
    )
    widths = {LayerKind.SWA: (), LayerKind.CSA: (HEAD_DIM, KEY_DIM), LayerKind.HCA: (HEAD_DIM,)}[spec.kind]
    return (rows, *(compressor_inputs(plan, spec, width, dtype, seed + width) for width in widths))
