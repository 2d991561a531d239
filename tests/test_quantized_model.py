"""The model with the release's quantized weights: the logits of the same numbers, not quantized."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from checkpoints import Tensors, decoded, read_tensors, with_release_names, write_folder
from test_deepseek_v4 import TOLERANCE, Model, all_logits, expected

from dsv4_jax import CacheManager, init_cache
from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.quantized import BlockFp8, PackedFp4, quantize_block_fp8, quantize_packed_fp4
from dsv4_jax.deepseek_v4.random_checkpoint import write_random_checkpoint

TINY = Path(__file__).parent / "data" / "tiny_deepseek_v4"


def as_released(plain: Tensors, released: Tensors) -> Tensors:
    """Every tensor in the format of the same one in a release."""
    result = {}
    for name, array in plain.items():
        dtype = released[name].dtype
        if dtype in (np.int8, ml_dtypes.float8_e4m3fn):
            quantized = (quantize_packed_fp4 if dtype == np.int8 else quantize_block_fp8)(array)
            result[name] = np.asarray(quantized.codes).view(dtype)
            result[name.removesuffix("weight") + "scale"] = np.asarray(quantized.scales).view(ml_dtypes.float8_e8m0fnu)
        else:
            result[name] = array.astype(dtype)
    return result


def prefill(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The fp32 logits of all tokens."""
    config, weights = load_checkpoint(folder)
    schema = Model(config, weights).schema()
    manager = CacheManager(schema, token_buckets=(len(tokens),))
    plan = manager.prepare_forward({manager.admit(): len(tokens)})
    run = all_logits("flash", dtype=jnp.float32)
    return np.asarray(run(weights, init_cache(schema), plan, plan.pack_tokens([tokens]))[1])


def test_logits_are_those_of_the_expanded_weights(tmp_path, seed):
    config, modules = json.loads((TINY / "config.json").read_text()), read_tensors(TINY)
    write_random_checkpoint(tmp_path / "random", config, seed)
    random = read_tensors(tmp_path / "random")
    tensors = as_released(with_release_names(modules, decoded(random)), random)
    quantized = write_folder(tmp_path / "checkpoint", config, tensors)
    plain = write_folder(tmp_path / "plain", config, decoded(tensors))
    layer = load_checkpoint(quantized)[1].layers[2]
    assert isinstance(layer.attention.indexer.query, BlockFp8)
    assert isinstance(layer.ffn.experts.down, PackedFp4)

    tokens = expected()["tokens.0"][:150]
    found, exact = prefill(quantized, tokens), prefill(plain, tokens)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, exact, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(found.argmax(axis=-1), exact.argmax(axis=-1))
    # Quantization itself is seen, and leaves the model what it was.
    theirs = expected()["flash.logits.0"][:150]
    assert 0.01 < np.linalg.norm(found - theirs) / np.linalg.norm(theirs) < 0.3
