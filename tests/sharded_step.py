"""The same ops plain and inside ``jax.shard_map`` on two devices, unrolled and in a scan: bytes must be equal.

Run by test_transformations.py with a seed.
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from implementations import IMPLEMENTATIONS
from jax.sharding import AxisType, PartitionSpec

from dsv4_jax import CompressorInputs, Rotary, StepPlan, ops
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.ops.operands import Compressed, Window

SHARDS, LAYERS, SLOTS, BLOCKS, MAX_BLOCKS, RING = 2, 2, 2, 6, 3, 128
LAYOUT = PlanLayout(tokens=12, requests=2)
ENTRY, KEY, ROW = ENTRY_FORMATS["fp8"], KEY_FORMATS["mxfp4"], WINDOW_FORMATS["fp8"]


def shard_of(rng):
    """State, plan and what tokens bring, of one shard."""
    table = rng.permutation(BLOCKS)[: SLOTS * MAX_BLOCKS].reshape(SLOTS, MAX_BLOCKS).astype(np.int32)
    state = {
        "table": table,
        "write_table": table.copy(),
        "window": np.zeros((LAYERS, SLOTS, *ROW.page_shape(RING)), ROW.dtype),
        "positions": np.full((LAYERS, SLOTS, RING), -1, np.int32),
        "entries": np.zeros((LAYERS, BLOCKS, *ENTRY.page_shape(32)), ENTRY.dtype),
        "tail": rng.normal(size=(LAYERS, SLOTS, 2, 12, 512)).astype(np.float32),
        "keys": np.zeros((LAYERS, BLOCKS, *KEY.page_shape(32)), KEY.dtype),
        "key_tail": rng.normal(size=(LAYERS, SLOTS, 2, 12, 128)).astype(np.float32),
    }
    plan = build_plan(LAYOUT, rng.permutation(SLOTS), rng.integers(0, 200, 2), [5, 7], [False, False]).packed
    brought = {"rows": rng.normal(size=(LAYOUT.tokens, 512)).astype(np.float32)}
    for prefix, width in (("", 512), ("key_", 128)):
        for name in ("kv", "gate"):
            brought[prefix + name] = rng.normal(size=(LAYOUT.tokens, 2 * width)).astype(np.float32)
    return state, plan, brought


def layer_step(implementation, weights, plan, brought, state, layer):
    """An update and every read of one layer."""
    by = {"implementation": implementation}

    def inputs(prefix):
        angles = Rotary(weights["cos"], weights["sin"])
        return CompressorInputs(
            brought[f"{prefix}kv"], brought[f"{prefix}gate"], weights[f"{prefix}bias"], weights[f"{prefix}norm"], angles
        )

    window, entries, keys = ops.update_csa(
        Window(state["window"], state["positions"]),
        Compressed(state["entries"], state["tail"]),
        Compressed(state["keys"], state["key_tail"]),
        brought["rows"],
        inputs(""),
        inputs("key_"),
        state["table"],
        plan,
        layer,
        layer,
        window_format=ROW,
        entry_format=ENTRY,
        key_format=KEY,
        eps=1e-6,
        **by,
    )
    options = {"ratio": 4, "dtype": jnp.float32, **by}
    pool, every = ops.gather_all_entries(entries.pool, state["table"], plan, layer, format=ENTRY, entries=40, **options)
    index = jnp.zeros((LAYOUT.tokens, 3), jnp.int32) + jnp.arange(3, dtype=jnp.int32)
    key_pool, chosen = ops.gather_entries(keys.pool, state["table"], plan, index, layer, format=KEY, **options)
    *window, newest = ops.gather_window(*window, plan, layer, format=ROW, dtype=jnp.float32, **by)
    tail = ops.rotate(entries.tail, plan, layer, ratio=4, **by)
    state |= {"window": window[0], "positions": window[1], "entries": pool, "tail": tail}
    state |= {"keys": key_pool, "key_tail": keys.tail}
    return state, sum(jnp.sum(rows.values) for rows in (every, chosen, newest))


def step(implementation, scanned, weights, state, packed, brought):
    """All layers; the state and a number of each layer that depends on what was read."""
    table, write_table, positions, plan = ops.begin_step(
        state["table"],
        state["write_table"],
        state["positions"],
        StepPlan(packed, LAYOUT),
        implementation=implementation,
    )
    state |= {"table": table, "write_table": write_table, "positions": positions}
    one = functools.partial(layer_step, implementation, weights, plan, brought)
    if scanned:
        return jax.lax.scan(one, state, jnp.arange(LAYERS, dtype=jnp.int32))
    read = []
    for layer in range(LAYERS):
        state, number = one(state, layer)
        read.append(number)
    return state, jnp.stack(read)


def axis_of(name):
    """Which axis of an array of the state shards lie side by side on: slots or blocks."""
    return 0 if name in ("table", "write_table") else 1


def compare(what, function, check_vma, plain, given):
    """The step inside ``shard_map`` against each shard's own."""
    spec = {name: PartitionSpec(*[None] * axis_of(name), "shard") for name in given[1]}
    first = PartitionSpec("shard")
    mapped = jax.shard_map(
        function,
        mesh=jax.make_mesh((SHARDS,), ("shard",), axis_types=(AxisType.Auto,)),
        in_specs=(PartitionSpec(), spec, first, first),
        out_specs=(spec, first),
        check_vma=check_vma,
    )
    made, read = jax.jit(mapped)(*given)
    for name, array in made.items():
        expected = np.concatenate([np.asarray(one[0][name]) for one in plain], axis_of(name))
        assert expected.tobytes() == np.asarray(array).tobytes(), f"{what}: {name}"
    np.testing.assert_allclose(read, np.concatenate([one[1] for one in plain]), rtol=1e-5, err_msg=what)


def main(seed):
    rng = np.random.default_rng(seed)
    shards = [shard_of(rng) for _ in range(SHARDS)]
    angles = rng.normal(size=(LAYOUT.closing_size(4), 32)).astype(np.float32)
    weights = {"cos": np.cos(angles), "sin": np.sin(angles)}
    for prefix, width in (("", 512), ("key_", 128)):
        weights[f"{prefix}bias"] = rng.normal(size=(4, 2 * width)).astype(np.float32)
        weights[f"{prefix}norm"] = rng.normal(size=width).astype(np.float32)

    state = {name: np.concatenate([s[0][name] for s in shards], axis_of(name)) for name in shards[0][0]}
    plan = np.concatenate([s[1] for s in shards])
    brought = {name: np.concatenate([s[2][name] for s in shards]) for name in shards[0][2]}
    given = (weights, state, plan, brought)
    for implementation, scanned in itertools.product(IMPLEMENTATIONS, (False, True)):
        slow = implementation == "reference"  # to compile: the case that asks most of its types
        if slow and not scanned:
            continue
        function = functools.partial(step, implementation, scanned)
        single = jax.jit(function)
        plain = [single(weights, *shard) for shard in shards]
        for check in (True,) if slow else (False, True):
            compare(f"{implementation}, scanned {scanned}, check_vma {check}", function, check, plain, given)


if __name__ == "__main__":
    main(int(sys.argv[1]))
