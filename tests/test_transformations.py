"""What JAX's transformations do with an op: derivatives and vmap are refused by one sentence, shard_map works."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_devices import environment_of
from harness import SPEC, inputs_of, random_tokens, random_weights
from implementations import IMPLEMENTATIONS

from dsv4_jax import PROFILES, CacheManager, CacheSchema, OperandError, begin, init_cache, ops

EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def _step(rng, implementation):
    """A step of 9 tokens as a function of what they bring, which all layers are given; and what they bring."""
    schema = CacheSchema(SPEC, PROFILES["exact"], slots=1, blocks=2, max_context=256)
    manager, cache = CacheManager(schema, token_buckets=(16,)), init_cache(schema)
    plan = manager.prepare_forward({manager.admit(): 9})
    weights = random_weights(rng)
    brought = random_tokens(rng, plan.layout.tokens)

    def loss(brought):
        total, step = 0.0, begin(cache, plan, implementation=implementation)
        for layer, arrays in enumerate(brought):
            inputs = [inputs_of(step.plan, SPEC, layer, weights[layer], arrays, prefix) for prefix in ("", "index_")]
            handle = step.layer(layer).update(arrays["rows"], *inputs)
            handle, rows = handle.window(dtype=jnp.float32)
            step, total = handle.step, total + jnp.sum(rows.values)
        return total

    return loss, brought


@EACH
def test_a_derivative_is_refused(rng, implementation):
    loss, brought = _step(rng, implementation)
    for function in (jax.grad(loss), jax.grad(jax.jit(loss)), lambda x: jax.jvp(loss, (x,), (x,))):
        with pytest.raises(OperandError, match=r"has no derivative.*jax\.lax\.stop_gradient"):
            function(brought)


@EACH
def test_stop_gradient_is_the_way_round(rng, implementation):
    loss, brought = _step(rng, implementation)

    def with_the_model(brought):
        return loss(jax.lax.stop_gradient(brought)) + jnp.sum(brought[0]["rows"] ** 2)

    slopes = jax.jit(jax.grad(with_the_model))(brought)
    np.testing.assert_allclose(slopes[0]["rows"], 2 * brought[0]["rows"], rtol=1e-6)
    assert not np.asarray(slopes[1]["kv"]).any()


@EACH
def test_vmap_is_refused(rng, implementation):
    page = PROFILES["default"].entry_format
    rows = rng.normal(size=(3, 5, 512)).astype(np.float32)
    with pytest.raises(OperandError, match=r"quantize has no rule for jax\.vmap: .*batched by its plan"):
        jax.vmap(lambda x: ops.quantize(x, format=page, implementation=implementation))(rows)
    loss, brought = _step(rng, implementation)
    with pytest.raises(OperandError, match=r"has no rule for jax\.vmap"):
        jax.jit(jax.vmap(loss))(jax.tree.map(lambda x: x[None], brought))


def test_shards_of_a_mesh_do_what_one_device_does(seed):
    """In a process of its own, which has two CPU devices."""
    script = Path(__file__).parent / "sharded_step.py"
    command = [sys.executable, str(script), str(seed)]
    ran = subprocess.run(command, env=environment_of(2), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
