"""Serving a model on meshes of CPU devices, as on one."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from aot import assert_in_place, compile_traced, h200_mesh
from cpu_devices import environment_of
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax import CacheFormats, CacheSchema, ConfigError, PlanLayout, StepPlan, init_cache
from dsv4_jax.cache.pools import slots_axis
from dsv4_jax.deepseek_v4.config import flash_config, read_config
from dsv4_jax.deepseek_v4.model import step
from dsv4_jax.deepseek_v4.placement import DATA, TENSOR, Placement, server_mesh, tensor_sizes, weight_sharding
from dsv4_jax.deepseek_v4.random_checkpoint import SMALL_CONFIG
from dsv4_jax.deepseek_v4.random_weights import random_weights

COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-[a-z]+)(?:-start)?\("
# Of which half has whole blocks for every kernel.
SIZES = dict(SMALL_CONFIG) | {
    "num_hidden_layers": 2,
    "compress_ratios": [4, 128, 0],
    "num_hash_layers": 1,
    "moe_intermediate_size": 512,
}


def test_a_server_on_a_mesh_is_one_server_a_shard(seed):
    program = Path(__file__).parent / "sharded_decode.py"
    result = subprocess.run(
        [sys.executable, program, str(seed)], env=environment_of(8), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines() == [f"equal: {mesh}" for mesh in ("1 x 2", "2 x 2", "4 x 2", "8 x 1")]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (flash_config(), [1, 2, 4, 8]),  # 8 groups of 8 heads
        (read_config(SMALL_CONFIG), [1, 2]),
        (read_config(SMALL_CONFIG | {"o_lora_rank": 64}), [1]),  # half of them shares a scale with the other
        (read_config(SMALL_CONFIG | {"num_attention_heads": 12, "o_groups": 6, "o_lora_rank": 64}), [1, 3]),
    ],
)
def test_heads_are_split_in_whole_groups_and_blocks(config, sizes):
    assert tensor_sizes(config) == sizes
    refused = next(size for size in itertools.count(2) if size not in sizes)
    with pytest.raises(ConfigError, match=f"over {refused} devices; tensor can be {', '.join(map(str, sizes))}."):
        server_mesh(config, tensor=refused)


def test_a_servers_mesh_has_two_axes():
    mesh = Mesh(jax.devices()[:1], (DATA,))
    with pytest.raises(ValueError, match="has the axes data and tensor, got data"):
        Placement(mesh)


def test_devices_of_h200s_tell_each_other_what_they_were_asked_to_alone(tmp_path):
    """A decode step in bfloat16, which has kernels for quantized weights, on 2 x 2 devices."""
    config = read_config(SIZES)
    mesh = Mesh(h200_mesh(4, "any").devices.reshape(2, 2), (DATA, TENSOR))
    placement, sharding = Placement(mesh), weight_sharding(config, mesh)
    schema = CacheSchema(config.spec, CacheFormats(), slots=2, blocks=4, max_context=256)
    layout = PlanLayout(2, 2, displaces=False)

    def lying(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def arrays_of(shards):
        like = jax.eval_shape(lambda: init_cache(schema))
        cache = dataclasses.replace(like, shards=shards, partitioned=True)
        specs, arrays = cache.partition_specs(DATA).arrays, {}
        for name, array in like.arrays.items():
            axis = slots_axis(name)
            shape = (*array.shape[:axis], shards * array.shape[axis], *array.shape[axis + 1 :])
            arrays[name] = lying(shape, array.dtype, specs[name])
        return cache.with_arrays(arrays)

    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: lying(
            leaf.shape, leaf.dtype, sharding(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape).spec
        ),
        jax.eval_shape(lambda: random_weights(config)),
    )
    given = PartitionSpec(DATA)
    plan = StepPlan(lying((2 * layout.size,), jnp.int32, given), layout)

    def run(cache, plan, weights, tokens):
        cache, logits, _ = step(weights, cache, plan, tokens, config=config, tensor_axis=placement.tensor_axis)
        return cache, logits

    specs = {"in_specs": (placement.weight_specs(config, weights), given), "out_specs": (given,)}
    traced = placement.program(run, **specs).trace(
        arrays_of(2), plan, weights, lying((2 * layout.tokens,), jnp.int32, given)
    )
    gpu = compile_traced(traced, tmp_path)
    sums = 2 * len(config.spec.layers)
    assert re.findall(COLLECTIVES, gpu.compiled.as_text()) == ["all-reduce"] * sums
    assert gpu.graphs == sums + 1  # a sum is in none, and parts one from the next
    assert gpu.custom_calls(captured=False) == 0
    assert_in_place(gpu.compiled, dict(schema.arrays), temporary_bytes=1 << 26)  # 2^25 are for cuBLAS to work in
