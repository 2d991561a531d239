"""The published models, and a small one with the same cache geometry."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4_jax.spec.kinds import HEAD_DIM, KEY_DIM, KIND_OF_RATIO, ROPE_DIM
from dsv4_jax.spec.model import LayerSpec, ModelSpec, RopeSpec


def deepseek_v4_flash(*, include_mtp: bool = False) -> ModelSpec:
    """DeepSeek-V4-Flash: 43 layers, 2 SWA, 21 CSA and 20 HCA (and one SWA layer more with ``include_mtp``)."""
    ratios = [0, 0, *_alternating(41)] + [0] * include_mtp
    return _published("deepseek_v4_flash", ratios, hidden_size=4096, num_heads=64, index_num_heads=64, index_topk=512)


def deepseek_v4_pro(*, include_mtp: bool = False) -> ModelSpec:
    """DeepSeek-V4-Pro: 61 layers, 30 CSA and 31 HCA (and one SWA layer with ``include_mtp``)."""
    ratios = [128, 128, *_alternating(59)] + [0] * include_mtp
    return _published("deepseek_v4_pro", ratios, hidden_size=7168, num_heads=128, index_num_heads=64, index_topk=1024)


def tiny_spec() -> ModelSpec:
    """A small model with the full cache geometry: an SWA, a CSA, an HCA and a second CSA layer."""
    return _published("tiny", [0, 4, 128, 4], hidden_size=128, num_heads=2, index_num_heads=4, index_topk=32)


def _alternating(layers: int) -> list[int]:
    return [128 if layer % 2 else 4 for layer in range(layers)]


def _published(name: str, ratios: Sequence[int], **sizes: int) -> ModelSpec:
    main, compress = RopeSpec(10_000.0), RopeSpec(160_000.0, factor=16.0)
    return ModelSpec(
        name=name,
        head_dim=HEAD_DIM,
        rope_dim=ROPE_DIM,
        index_head_dim=KEY_DIM,
        window=128,
        norm_eps=1e-6,
        max_position=1_048_576,
        layers=tuple(LayerSpec(KIND_OF_RATIO[ratio], compress if ratio else main) for ratio in ratios),
        **sizes,
    )
