"""Random weights made on the device: the formats of a release, and numbers of the size that a model needs."""

import types

import jax
import numpy as np
import pytest

from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from dsv4_jax.deepseek_v4.random_weights import random_weights
from dsv4_jax.deepseek_v4.weights import expand
from dsv4_jax.tools.bench import model_step
from dsv4_jax.tools.bench.workload import FULL

CONFIG = dict(SMALL_CONFIG) | {"num_hidden_layers": 2, "compress_ratios": [4, 128], "num_hash_layers": 1}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "release"
    write_random_checkpoint(folder, CONFIG, seed=0)
    return load_checkpoint(folder)


@jax.jit
def expanded(weights):
    return jax.tree.map(lambda leaf: expand(leaf, np.float32), weights, is_leaf=lambda node: hasattr(node, "expand"))


def numbers(weights):
    """Every weight of a model, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(expanded(weights))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_as_a_checkpoint_is_loaded(loaded, seed):
    config, weights = loaded
    made = random_weights(config, seed % 1000)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), weights)
    expected = numbers(weights)
    for path, found in numbers(made).items():
        assert np.isfinite(found).all(), path
        if path.endswith("token_experts"):
            assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()
            assert set(np.unique(found)) == set(range(config.num_experts))
        elif found.size > 1000:
            # Scales are powers of two: within a factor of its root.
            assert 0.65 < found.std() / expected[path].std() < 1.5, path
    again = random_weights(config, seed % 1000)
    assert all(map(np.array_equal, jax.tree.leaves(made), jax.tree.leaves(again)))


@pytest.mark.parametrize("gigabytes", [60, 141, 180])
def test_as_many_experts_as_fit(gigabytes, monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": gigabytes * 10**9})
    config = load(monkeypatch, device)
    schema = model_step.model_schema(config, 64, 65_536)
    whole = jax.eval_shape(lambda: random_weights(config))
    taken = schema.memory_bytes + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole))
    one_step = model_step.EXPERTS_STEP * 43 * 3 * 4096 * 2048 * (1 / 2 + 1 / 32)
    assert taken <= 0.9 * gigabytes * 10**9
    assert config.num_experts == 256 or taken + one_step > 0.9 * gigabytes * 10**9
    assert config.num_experts % model_step.EXPERTS_STEP == 0


def load(monkeypatch, device):
    with monkeypatch.context() as patched:
        patched.setattr(jax, "devices", lambda: [device])
        return model_step.model_config(FULL)


def test_too_small_a_device_is_said(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 24 * 10**9})
    with pytest.raises(model_step.NoFigureError, match=r"with 16 experts takes .* 24,000,000,000 are there"):
        load(monkeypatch, device)


def test_experts_that_nobody_chose_are_not_read(loaded):
    _, weights = loaded
    every = model_step._moved(weights, [8, 8])
    one_expert = 3 * 128 * 256 * (1 / 2 + 1 / 32)
    assert every - model_step._moved(weights, [3, 8]) == 5 * one_expert
    assert every < sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
