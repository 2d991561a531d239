"""The tables of docs/model.md: bytes of weights and of the cache, computed again."""

import math
import re
from pathlib import Path

import jax
import pytest
from test_deepseek_v4_config import deepseek

from dsv4_jax import PROFILES, capacity_plan, deepseek_v4_flash, deepseek_v4_pro
from dsv4_jax.deepseek_v4.config import read_config
from dsv4_jax.deepseek_v4.weights import weight_shapes

PAGE = (Path(__file__).parents[1] / "docs/model.md").read_text(encoding="utf-8")
PRO = {
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "index_topk": 1024,
    "num_hidden_layers": 61,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}
CONFIGS = {"DeepSeek-V4-Flash": deepseek(), "DeepSeek-V4-Pro": deepseek() | PRO}
PRESETS = {"DeepSeek-V4-Flash": deepseek_v4_flash(), "DeepSeek-V4-Pro": deepseek_v4_pro()}


def rows(name: str) -> list[list[str]]:
    return [[cell.strip(" `") for cell in row.split("|")] for row in re.findall(rf"^\| {name} \| (.*) \|$", PAGE, re.M)]


def blocks(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-2]) * math.prod(math.ceil(size / 128) for size in shape[-2:])


def stored_bytes(path: str, leaf, experts: str) -> int:
    """Of a weight: float32 small ones, quantized large ones where ``experts`` says so, bfloat16."""
    size, last = math.prod(leaf.shape), path.rpartition(".")[2]
    if leaf.dtype == "int32" or last in ("position_bias", "sinks", "fn", "base", "scale", "bias"):
        return 4 * size
    matrix = last in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b") or path.endswith("indexer.query") or ".shared." in path
    if experts == "BF16" or not (matrix or ".experts." in path):
        return 2 * size
    if ".experts." in path and experts == "FP4":
        return size // 2 + size // 32
    return size + blocks(leaf.shape) * (1 if experts == "FP4" else 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_weights(name):
    config = read_config(CONFIGS[name])
    assert config.spec == PRESETS[name]
    leaves = jax.tree_util.tree_leaves_with_path(weight_shapes(config))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    stated = next(row for row in rows(name) if len(row) == 4 and row[0] not in PROFILES)
    assert float(stated[0]) == round(sum(math.prod(leaf.shape) for leaf in found.values()) / 1e9, 1)
    for number, experts in zip(stated[1:], ("FP4", "FP8", "BF16"), strict=True):
        assert float(number) == round(sum(stored_bytes(path, leaf, experts) for path, leaf in found.items()) / 1e9, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_the_cache(name):
    stated = {row[0]: row[1:] for row in rows(name) if row[0] in PROFILES}
    assert stated.keys() == {"default", "exact"}
    for formats, numbers in stated.items():
        for number, context in zip(numbers, (4096, 65_536, 1_048_576), strict=True):
            planned = capacity_plan(PRESETS[name], PROFILES[formats], context=context)
            assert float(number) == round(planned.bytes_per_request / 1e9, 3)
