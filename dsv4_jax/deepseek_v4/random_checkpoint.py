"""A small random checkpoint in the release's form: its names, dtypes and quantization, and the full cache geometry.

Layers of all three kinds, hyper-connections, hashed and scored experts: what loads and runs it has loaded and run
everything that a released checkpoint has.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dsv4_jax.deepseek_v4.config import read_config
from dsv4_jax.deepseek_v4.names import place, scale_names
from dsv4_jax.deepseek_v4.quantized import quantize_block_fp8, quantize_packed_fp4
from dsv4_jax.deepseek_v4.weights import weight_shapes
from dsv4_jax.tensor_files import write_file

_REVISION = 1  # of what is written: one more makes what lies in a cache folder obsolete

SMALL_CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 256,  # bytes
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4, 0],  # and the MTP layer, whose weights are left out
    "num_nextn_predict_layers": 1,
    "num_hash_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "sliding_window": 128,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "o_groups": 2,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 32,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1_048_576,
    "rope_theta": 10_000,
    "compress_rope_theta": 160_000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65_536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "expert_dtype": "fp4",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
"""Of the checkpoint that ``random_checkpoint`` writes."""


def random_checkpoint(seed: int = 0) -> Path:
    """The folder of a small random checkpoint (10 MB), written if it is not there yet.

    It lies in ``$XDG_CACHE_HOME/dsv4-jax``, by default ``~/.cache/dsv4-jax``, and appears there whole or not at all.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    cache = (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "dsv4-jax"
    folder = cache / f"random-checkpoint-{_REVISION}-seed-{seed}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}.", ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "checkpoint"
        write_random_checkpoint(made, SMALL_CONFIG, seed)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and wrote the same
                raise
    return folder


def write_random_checkpoint(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    """Writes config.json and model.safetensors into a new folder.

    Args:
      folder: must not exist.
      config: as DeepSeek's config.json; it is written as it is. All weights are in memory until they are written.
      seed: of the weights, which are the same on every platform.
    """
    rng = np.random.default_rng(seed)
    model = read_config(config)
    tensors: dict[str, NDArray[Any]] = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(weight_shapes(model))[0]:
        path = jax.tree_util.keystr(key, simple=True, separator=".")
        where = place("release", path, model.num_experts)
        for name in where.names:
            shape = leaf.shape[1:] if where.stacked else leaf.shape
            if leaf.dtype == jnp.int32:
                order = rng.random((shape[0], model.num_experts)).argsort(axis=1)
                tensors[name] = order[:, : shape[1]].astype(np.int64)
            else:
                weight = _random_weight(path, shape, rng)
                tensors.update(_stored(path, name, weight))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_file(folder / "model.safetensors", tensors)


def _random_weight(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    mean, deviation = distribution(path, shape)
    return np.float32(mean) + rng.standard_normal(shape, np.float32) * np.float32(deviation)


def distribution(path: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of normal numbers with which every weight has an effect of order one on the logits."""
    last = path.rpartition(".")[2]
    if last.endswith("norm") or last == "scale":
        return 1.0, 0.25
    if last == "bias":
        return 0.0, 0.25  # beside scores of order one
    if path == "embed" or last in ("sinks", "position_bias", "base"):
        return 0.0, 1.0
    # An average over a hundred rows is small: the gain brings it back to the size of the residual streams.
    gain = 4 if last == "wo_b" else 1
    return 0.0, gain * shape[-1] ** -0.5


StoredAs = Literal["fp8", "fp4", "float32", "bfloat16"]

_FP8 = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.query", "shared.gate", "shared.up", "shared.down")
_FP4 = ("experts.gate", "experts.up", "experts.down")
_FLOAT32 = ("position_bias", "sinks", "fn", "base", "scale", "bias")


def stored_as(path: str) -> StoredAs:
    """The format that the release has a weight in: ``BlockFp8`` and ``PackedFp4`` with UE8M0 scales, or plain."""
    if path.endswith(_FP8):
        return "fp8"
    if path.endswith(_FP4):
        return "fp4"
    return "float32" if path.endswith(_FLOAT32) else "bfloat16"


def _stored(path: str, name: str, weight: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """A weight in the format that the release has it in: its tensor, or its codes and scales."""
    match stored_as(path):
        case "fp8":
            quantized = quantize_block_fp8(weight)
            return {name: np.asarray(quantized.codes), scale_names(name)[0]: _ue8m0(quantized.scales)}
        case "fp4":
            packed = quantize_packed_fp4(weight)
            return {name: np.asarray(packed.codes).view(np.int8), scale_names(name)[0]: _ue8m0(packed.scales)}
        case "float32":
            return {name: weight}
        case "bfloat16":
            return {name: weight.astype(jnp.bfloat16)}


def _ue8m0(scales: Any) -> NDArray[Any]:
    return np.asarray(scales).view(jnp.float8_e8m0fnu)
