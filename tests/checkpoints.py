"""Checkpoints for tests: read and rewritten by the definitions alone, under any of the three name schemes."""

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]

DTYPES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


def read_tensors(folder: Path) -> Tensors:
    """All tensors of model.safetensors."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    found = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def file_of(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file of these tensors."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()} | {np.dtype(np.float64): "F64"}
    header, end = {}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values())


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(file_of(tensors))
    return folder


def decoded(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """A release's quantized tensors as fp32 numbers; the others as they are."""
    result = {}
    for name, array in tensors.items():
        scale = tensors.get(name.removesuffix("weight") + "scale")
        if name.endswith(".scale"):
            continue
        if scale is not None and array.dtype == np.int8:
            array = decoded_fp4(array, scale)
        elif scale is not None:
            factors = scale.astype(np.float32).repeat(128, axis=0).repeat(128, axis=1)
            array = array.astype(np.float32) * factors[: array.shape[0], : array.shape[1]]
        result[name] = array
    return result


def decoded_fp4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    nibbles = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], axis=-1)
    return grid[nibbles].reshape(len(codes), -1) * scale.astype(np.float32).repeat(32, axis=1)


# What turns a release's names into those of Hugging Face's modules, in this order.
MODULES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers\.", "model.layers."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.wq_b\.", ".attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.attn_sink$", ".attn.sinks"),
    (r"(\.compressor.*)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.w(q|o)_(a|b)\.", r".\1_\2_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"(shared_experts)\.w1\.", r"\1.gate_proj."),
    (r"(shared_experts)\.w3\.", r"\1.up_proj."),
    (r"(shared_experts)\.w2\.", r"\1.down_proj."),
    (r"\.ffn\.", ".mlp."),
    (r"(?<!_hc)\.scale$", ".weight_scale_inv"),
)


EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w\d)\.(weight|scale)")


def module_name(name: str) -> str:
    """A release's name, not of a routed expert, as that of Hugging Face's module."""
    for pattern, replacement in MODULES:
        name = re.sub(pattern, replacement, name)
    return name


def with_module_names(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """A release's tensors under the names of Hugging Face's modules; the experts of a layer as one tensor."""
    result, experts = {}, {}
    for name, array in tensors.items():
        if found := EXPERT.fullmatch(name):
            layer, expert, which, what = found.groups()
            experts.setdefault((layer, what), {})[int(expert), which] = array
        else:
            result[module_name(name)] = array
    for (layer, what), parts in experts.items():
        count, end = 1 + max(expert for expert, _ in parts), "_scale_inv" if what == "scale" else ""
        gate_up = [np.concatenate([parts[e, "w1"], parts[e, "w3"]]) for e in range(count)]
        result[f"model.layers.{layer}.mlp.experts.gate_up_proj{end}"] = np.stack(gate_up)
        result[f"model.layers.{layer}.mlp.experts.down_proj{end}"] = np.stack([parts[e, "w2"] for e in range(count)])
    return result


def with_saved_names(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """A release's tensors under the names that Hugging Face's ``save_pretrained`` gives them."""
    result = {}
    for name, array in tensors.items():
        name = re.sub(r"^layers\.", "model.layers.", name).replace(".attn.kv_norm.", ".attn.norm.")
        name = re.sub(r"^embed\.", "model.embed_tokens.", name)
        name = re.sub(r"^norm\.", "model.norm.", name)
        result[re.sub(r"^hc_head_", "model.hc_head.hc_", name)] = array
    return result


def with_release_names(modules: Mapping[str, np.ndarray], names: Iterable[str]) -> Tensors:
    """Tensors of Hugging Face's modules under a release's names, which are given."""
    result = {}
    for name in names:
        if found := EXPERT.fullmatch(name):
            layer, expert, which, _ = found.groups()
            fused = modules[f"model.layers.{layer}.mlp.experts.{'down_proj' if which == 'w2' else 'gate_up_proj'}"]
            one, half = fused[int(expert)], fused.shape[1] // 2
            result[name] = {"w1": one[:half], "w3": one[half:], "w2": one}[which]
        else:
            result[name] = modules[module_name(name)]
    return result
