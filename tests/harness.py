"""Drives a cache with given projections: what every request's tokens bring, fed in steps of any shape."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import (
    Cache,
    CacheFormats,
    CacheManager,
    CacheSchema,
    CompressorInputs,
    LayerCache,
    LayerKind,
    ModelSpec,
    StepPlan,
    begin,
    closing_rotary,
    init_cache,
    ops,
    tiny_spec,
)
from dsv4_jax.cache.layer_state import parts_of
from dsv4_jax.cache.step import Step
from dsv4_jax.layout.formats import VectorFormat

Arrays = dict[str, np.ndarray]

SPEC = dataclasses.replace(tiny_spec(), layers=tiny_spec().layers[:3])
"""One layer of each kind: SWA, CSA, HCA."""

POOLS = (
    "window",
    "window_positions",
    "csa_entries",
    "csa_keys",
    "hca_entries",
    "csa_tail",
    "csa_key_tail",
    "hca_tail",
)


def columns(kind: LayerKind) -> dict[str, int]:
    """Columns of what a layer's tokens bring, by name."""
    of_kind = {
        LayerKind.SWA: {},
        LayerKind.CSA: {"kv": 1024, "gate": 1024, "index_kv": 256, "index_gate": 256},
        LayerKind.HCA: {"kv": 512, "gate": 512},
    }
    return {"rows": 512, **of_kind[kind]}


def random_weights(rng: np.random.Generator, spec: ModelSpec = SPEC) -> list[Arrays]:
    """Position biases and norm weights of every layer, each with an effect of order one."""
    weights = []
    for layer in spec.layers:
        made = {}
        for prefix, width in (("", 512), ("index_", 128)):
            wanted = columns(layer.kind).get(f"{prefix}kv")
            if wanted:
                made[f"{prefix}ape"] = rng.normal(size=(layer.kind.ratio, wanted)).astype(np.float32)
                made[f"{prefix}norm"] = (1 + 0.2 * rng.normal(size=width)).astype(np.float32)
        weights.append(made)
    return weights


def random_tokens(rng: np.random.Generator, tokens: int, dtype=np.float32, spec: ModelSpec = SPEC) -> list[Arrays]:
    """What `tokens` tokens bring to every layer."""
    return [
        {name: rng.normal(size=(tokens, width)).astype(dtype) for name, width in columns(layer.kind).items()}
        for layer in spec.layers
    ]


def inputs_of(
    plan: StepPlan, spec: ModelSpec, layer: int, weights: Arrays, brought: Mapping[str, jax.Array], prefix=""
):
    """A layer's compressor (or, with prefix "index_", indexer) inputs, None if it has none."""
    if f"{prefix}kv" not in brought:
        return None
    kind = spec.layers[layer].kind
    return CompressorInputs(
        brought[f"{prefix}kv"],
        brought[f"{prefix}gate"],
        jnp.asarray(weights[f"{prefix}ape"]),
        jnp.asarray(weights[f"{prefix}norm"]),
        closing_rotary(plan, kind.ratio, spec.layers[layer].rope),
    )


def _each_layer(cache: Cache, plan: StepPlan, weights, brought, implementation: str, write) -> Cache:
    step = begin(cache, plan, implementation=implementation)
    for layer, arrays in enumerate(brought):
        compressor = inputs_of(step.plan, cache.schema.spec, layer, weights[layer], arrays)
        indexer = inputs_of(step.plan, cache.schema.spec, layer, weights[layer], arrays, "index_")
        step = write(step.layer(layer), arrays["rows"], compressor, indexer).step
    return step.end()


def reader(cache: Cache, plan: StepPlan, layer: int, implementation: str = "native") -> LayerCache:
    """A layer to read from after the step of ``plan`` has run."""
    kind = cache.schema.spec.layers[layer].kind
    return Step(cache, plan, implementation).layer(layer)._written(*parts_of(kind))


def update(cache: Cache, plan: StepPlan, weights: Sequence[Arrays], brought, *, implementation="native") -> Cache:
    """One step, one op a layer."""
    return _each_layer(cache, plan, weights, brought, implementation, LayerCache.update)


def _store_closed(handle: LayerCache, compressor, indexer) -> LayerCache:
    if compressor is not None:
        handle, entries = handle.compress(compressor)
        handle = handle.flush(entries)
    if indexer is not None:
        handle, keys = handle.compress_keys(indexer)
        handle = handle.flush_keys(keys)
    return handle


def _rotate(handle: LayerCache) -> LayerCache:
    """Clears what closed windows leave in the tails, which nothing reads."""
    step, kind = handle.step, handle.kind
    row = step.schema.rows(handle.layer).compressed
    names = [name for name in step.schema.tails if name.startswith(kind.value)]
    options = {"ratio": kind.ratio, "implementation": step.implementation}
    tails = {name: ops.rotate(step.cache.pools[name], step.plan, row, **options) for name in names}
    cache = step.cache.with_arrays(tails)
    return dataclasses.replace(handle, step=dataclasses.replace(step, cache=cache))


def write_op_by_op(handle: LayerCache, rows, compressor, indexer) -> LayerCache:
    """All writes of a layer by separate ops: compress, flush, append, rotate."""
    return _rotate(_store_closed(handle, compressor, indexer).append(rows, compressor, indexer))


def update_op_by_op(cache: Cache, plan: StepPlan, weights, brought, *, implementation="native") -> Cache:
    """The same step by separate ops: compress, flush, append, rotate."""

    return _each_layer(cache, plan, weights, brought, implementation, write_op_by_op)


def update_append_first(cache: Cache, plan: StepPlan, weights, brought, *, implementation="native") -> Cache:
    """The same step in the order append, compress, flush, rotate; for steps of one token per request."""

    def write(handle, rows, compressor, indexer):
        return _rotate(_store_closed(handle.append(rows, compressor, indexer), compressor, indexer))

    return _each_layer(cache, plan, weights, brought, implementation, write)


def tail_rows_in_use(length: int, ratio: int, lookahead: int = 0) -> list[int]:
    """Rows of a tail that an entry closed later will pool, once a request has `length` tokens; oldest first.

    CSA's overlap halves come first. Rows that only matter if the request goes back are not among them.
    """
    open_window, previous = range(length - length % ratio, length), range(length - length % ratio - 4, length)
    if ratio == 128:
        return [position % (128 + lookahead) for position in open_window]
    depth = -(-lookahead // 4) * 4
    overlap = [position % (8 + depth) for position in previous if position >= 0]
    return overlap + [8 + depth + position % (4 + depth) for position in open_window]


def page_rows(pages: np.ndarray, vector_format: VectorFormat, rows: int) -> np.ndarray:
    """Pages [layers, pages, *page] as rows [layers, pages * rows, whatever a row has], without what pads a page."""
    layers, count = pages.shape[:2]
    if not vector_format.quantized:
        return pages.reshape(layers, count * rows, -1)
    parts, start = [], 0
    for size in (vector_format.data_bytes, vector_format.scale_bytes):
        parts.append(pages[..., start : start + rows * size].reshape(layers, count * rows, size))
        start += rows * size
    return np.concatenate(parts, axis=2)


@functools.cache
def _jitted(step, implementation: str):
    """A step's jitted function: one, whichever driver runs it, so that equal shapes are compiled once."""
    return jax.jit(functools.partial(step, implementation=implementation), donate_argnums=0)


class Driver:
    """A cache, its manager, and sequences that are fed to it by request."""

    def __init__(
        self,
        weights: Sequence[Arrays],
        formats: CacheFormats,
        *,
        slots: int = 3,
        blocks: int = 32,
        max_context: int = 1024,
        lookahead: int = 0,
        snapshots: int = 0,
        buckets: Sequence[int] = (1, 3, 16, 64, 256, 1024),
        implementation: str = "native",
        step=update,
        **options,
    ):
        self.schema = CacheSchema(SPEC, formats, slots, blocks, max_context, lookahead, snapshots)
        self.manager = CacheManager(self.schema, token_buckets=buckets, **options)
        self.cache = init_cache(self.schema)
        self.weights = weights
        self._step = _jitted(step, implementation)
        self.sequences: dict[int, list[Arrays]] = {}

    def admit(self, sequence: list[Arrays]) -> int:
        """A new request that will bring the tokens of `sequence`."""
        request = self.manager.admit()
        self.sequences[request] = sequence
        return request

    def release(self, request: int) -> None:
        """Gives the request's slot and blocks back."""
        self.manager.release(request)
        del self.sequences[request]

    def feed(self, counts: Mapping[int, int]) -> StepPlan:
        """One step that brings `counts` tokens of each request."""
        plan, brought = self.prepare(counts)
        self.run(plan, brought)
        return plan

    def run(self, plan: StepPlan, brought) -> None:
        """One step of a plan that was prepared before."""
        self.cache = self._step(self.cache, plan, self.weights, brought)

    def brought(self, counts: Mapping[int, int], plan: StepPlan) -> list[dict[str, jax.Array]]:
        """What the tokens of a plan bring: `counts` by request, in the plan's order."""
        starts = dict(zip(counts, plan.request_start.tolist(), strict=False))
        return self._brought(starts, counts, plan.layout.tokens)

    def prepare(self, counts: Mapping[int, int], steps: int | None = None) -> tuple[StepPlan, list]:
        """The plan that brings `counts` tokens of each request, and what they bring; with `steps`, both stacked."""
        starts = {request: self.manager.length(request) for request in counts}
        plan = self.manager.prepare_forward(counts, steps=steps)
        brought = [
            self._brought({r: start + step * counts[r] for r, start in starts.items()}, counts, plan.layout.tokens)
            for step in range(steps or 1)
        ]
        return plan, brought[0] if steps is None else jax.tree.map(lambda *arrays: jnp.stack(arrays), *brought)

    def _brought(self, starts: Mapping[int, int], counts: Mapping[int, int], tokens: int) -> list[dict[str, jax.Array]]:
        # Flat, in the plan's order; padding is poisoned with NaN.
        layers = []
        for layer in range(len(SPEC.layers)):
            arrays = {}
            for name in next(iter(self.sequences.values()))[layer]:
                parts = [self.sequences[r][layer][name][starts[r] : starts[r] + n] for r, n in counts.items()]
                flat = np.concatenate(parts)
                padding = np.full((tokens - len(flat), flat.shape[1]), np.nan, flat.dtype)
                arrays[name] = jnp.asarray(np.concatenate([flat, padding]))
            layers.append(arrays)
        return layers

    def visible(self, request: int) -> dict[str, np.ndarray]:
        """What of ``stored`` counts: where tokens were taken back, the ring and the last block hold more than that."""
        stored, length = self.stored(request), self.manager.length(request)
        visible = np.arange(max(length - 127, 0), length) % self.schema.ring
        stored |= {name: stored[name][:, visible] for name in ("window", "window_positions")}
        formats = self.schema.formats
        for name, ratio in (("csa_entries", 4), ("csa_keys", 4), ("hca_entries", 128)):
            vector_format = formats.key_format if name == "csa_keys" else formats.entry_format
            stored[name] = page_rows(stored[name], vector_format, 128 // ratio)[:, : length // ratio]
        return stored

    def stored(self, request: int) -> dict[str, np.ndarray]:
        """Every stored byte of one request, in the order of its context, wherever its slot and blocks lie.

        Tail rows that are not in use read as cleared, whatever they hold.
        """
        slot, blocks = self.manager.slot(request), np.asarray(self.manager.blocks(request))
        by_block = {"csa_entries", "csa_keys", "hca_entries"}
        stored = {}
        for name in POOLS:
            array = np.asarray(self.cache.arrays[name])
            stored[name] = array[:, blocks] if name in by_block else array[:, slot].copy()
        for name, ratio in (("csa_tail", 4), ("csa_key_tail", 4), ("hca_tail", 128)):
            if stored[name].ndim == 3:  # a running tail: the latest state, which nothing reads between two windows
                length, states = self.manager.length(request), 1 + self.schema.lookahead
                row = 3 * ((length - 1) % states)
                stored[name] = stored[name][:, row : row + 3]
                if length % ratio == 0:
                    stored[name][:] = np.array([-1e9, 0, 0], np.float32)[:, None]
                continue
            unused = np.ones(stored[name].shape[2], bool)
            unused[tail_rows_in_use(self.manager.length(request), ratio, self.schema.lookahead)] = False
            stored[name][:, 0, unused] = 0
            stored[name][:, 1, unused] = -1e9
        return stored


def random_chunks(rng: np.random.Generator, total: int, largest: int) -> list[int]:
    """Step sizes that add up to `total`, many of them one."""
    chunks = []
    while (left := total - sum(chunks)) > 0:
        size = 1 if rng.random() < 0.3 else int(rng.integers(1, largest + 1))
        chunks.append(min(size, left))
    return chunks


def assert_same_bytes(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], what: str) -> None:
    """Bit-equality of two sets of arrays."""
    for name, array in left.items():
        other = right[name]
        assert array.shape == other.shape, f"{what}: {name} {array.shape} and {other.shape}"
        if array.tobytes() != other.tobytes():
            differing = np.argwhere(array.view(np.uint8) != other.view(np.uint8))
            raise AssertionError(f"{what}: {name} differs in {len(differing)} bytes, first at {differing[0].tolist()}")
