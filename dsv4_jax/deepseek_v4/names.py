"""What the weights are called in checkpoints: one table of three schemes.

``release`` is DeepSeek's own. ``modules`` are the names of Hugging Face's modules, where the routed experts of a layer
are one tensor, gate and up projections the upper and lower half of its rows. ``saved`` is what ``save_pretrained``
writes: release names below ``model.``, with those exceptions that the table has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

Scheme = Literal["release", "modules", "saved"]
SCHEMES: tuple[Scheme, ...] = ("release", "modules", "saved")


class _Row(NamedTuple):
    """A weight's path, in ``ModelWeights`` or in one of its ``LayerWeights``, and its names, ``{e}`` for an expert."""

    path: str
    release: str
    modules: str
    saved: str = ""  # as in the release
    matrix: bool = False  # may be quantized


_OF_MODEL = (
    _Row("embed", "embed.weight", "model.embed_tokens.weight", "model.embed_tokens.weight"),
    _Row("hc_head.fn", "hc_head_fn", "model.hc_head.hc_fn", "model.hc_head.hc_fn"),
    _Row("hc_head.base", "hc_head_base", "model.hc_head.hc_base", "model.hc_head.hc_base"),
    _Row("hc_head.scale", "hc_head_scale", "model.hc_head.hc_scale", "model.hc_head.hc_scale"),
    _Row("norm", "norm.weight", "model.norm.weight", "model.norm.weight"),
    _Row("head", "head.weight", "lm_head.weight", matrix=True),
)

_PREFIX = {"release": "layers.", "modules": "model.layers.", "saved": "model.layers."}  # and the layer's number

_OF_LAYER = (
    _Row("hc_attn.fn", "hc_attn_fn", "attn_hc.fn"),
    _Row("hc_attn.base", "hc_attn_base", "attn_hc.base"),
    _Row("hc_attn.scale", "hc_attn_scale", "attn_hc.scale"),
    _Row("attn_norm", "attn_norm.weight", "input_layernorm.weight"),
    _Row("attention.wq_a", "attn.wq_a.weight", "self_attn.q_a_proj.weight", matrix=True),
    _Row("attention.q_norm", "attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    _Row("attention.wq_b", "attn.wq_b.weight", "self_attn.q_b_proj.weight", matrix=True),
    _Row("attention.wkv", "attn.wkv.weight", "self_attn.kv_proj.weight", matrix=True),
    _Row("attention.kv_norm", "attn.kv_norm.weight", "self_attn.kv_norm.weight", "attn.norm.weight"),
    _Row("attention.sinks", "attn.attn_sink", "self_attn.sinks"),
    _Row("attention.wo_a", "attn.wo_a.weight", "self_attn.o_a_proj.weight", matrix=True),
    _Row("attention.wo_b", "attn.wo_b.weight", "self_attn.o_b_proj.weight", matrix=True),
    _Row("attention.compressor.kv", "attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight", matrix=True),
    _Row(
        "attention.compressor.gate",
        "attn.compressor.wgate.weight",
        "self_attn.compressor.gate_proj.weight",
        matrix=True,
    ),
    _Row("attention.compressor.position_bias", "attn.compressor.ape", "self_attn.compressor.position_bias"),
    _Row("attention.compressor.norm", "attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight"),
    _Row(
        "attention.indexer.query",
        "attn.indexer.wq_b.weight",
        "self_attn.compressor.indexer.q_b_proj.weight",
        matrix=True,
    ),
    _Row(
        "attention.indexer.head_weights",
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
        matrix=True,
    ),
    _Row(
        "attention.indexer.compressor.kv",
        "attn.indexer.compressor.wkv.weight",
        "self_attn.compressor.indexer.kv_proj.weight",
        matrix=True,
    ),
    _Row(
        "attention.indexer.compressor.gate",
        "attn.indexer.compressor.wgate.weight",
        "self_attn.compressor.indexer.gate_proj.weight",
        matrix=True,
    ),
    _Row(
        "attention.indexer.compressor.position_bias",
        "attn.indexer.compressor.ape",
        "self_attn.compressor.indexer.position_bias",
    ),
    _Row(
        "attention.indexer.compressor.norm",
        "attn.indexer.compressor.norm.weight",
        "self_attn.compressor.indexer.kv_norm.weight",
    ),
    _Row("hc_ffn.fn", "hc_ffn_fn", "ffn_hc.fn"),
    _Row("hc_ffn.base", "hc_ffn_base", "ffn_hc.base"),
    _Row("hc_ffn.scale", "hc_ffn_scale", "ffn_hc.scale"),
    _Row("ffn_norm", "ffn_norm.weight", "post_attention_layernorm.weight"),
    _Row("ffn.gate", "ffn.gate.weight", "mlp.gate.weight", matrix=True),
    _Row("ffn.bias", "ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    _Row("ffn.token_experts", "ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    _Row("ffn.experts.gate", "ffn.experts.{e}.w1.weight", "mlp.experts.gate_up_proj", matrix=True),
    _Row("ffn.experts.up", "ffn.experts.{e}.w3.weight", "mlp.experts.gate_up_proj", matrix=True),
    _Row("ffn.experts.down", "ffn.experts.{e}.w2.weight", "mlp.experts.down_proj", matrix=True),
    _Row("ffn.shared.gate", "ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight", matrix=True),
    _Row("ffn.shared.up", "ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight", matrix=True),
    _Row("ffn.shared.down", "ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight", matrix=True),
)

_ROWS = {row.path: row for row in (*_OF_MODEL, *_OF_LAYER)}
_HALVES = {"ffn.experts.gate": 0, "ffn.experts.up": 1}  # of the rows, where both have one name


class Place(NamedTuple):
    """Where a weight is in a checkpoint.

    Attributes:
      names: of its tensor, or of one tensor for every expert.
      stacked: whether the weight is a stack of those, along a new axis in front.
      half: which half of the tensor's rows it is, 0 or 1; None for all of them.
      matrix: whether it may be quantized.
    """

    names: tuple[str, ...]
    stacked: bool
    half: int | None
    matrix: bool


def place(scheme: Scheme, path: str, num_experts: int) -> Place:
    """Where a weight is, by its path in ``ModelWeights``, such as ``"layers.3.attention.wq_a"``."""
    prefix, within = "", path
    if path.startswith("layers."):
        _, layer, within = path.split(".", 2)
        prefix = f"{_PREFIX[scheme]}{layer}."
    row = _ROWS[within]
    name = getattr(row, scheme) or row.release
    stacked = "{e}" in name
    names = tuple(prefix + name.format(e=expert) for expert in range(num_experts if stacked else 1))
    return Place(names, stacked, None if stacked or scheme != "modules" else _HALVES.get(within), row.matrix)


def scale_names(name: str) -> tuple[str, str]:
    """What the scales of a quantized tensor may be called: DeepSeek's way and Hugging Face's."""
    return f"{name.removesuffix('.weight')}.scale", f"{name}_scale_inv"


def is_ignored(name: str) -> bool:
    """Whether a tensor is of the MTP layers, which are no part of the model."""
    return name.startswith(("mtp.", "model.mtp."))


def recognise(names: Collection[str], paths: Iterable[str], num_experts: int) -> Scheme | None:
    """The scheme that most of a checkpoint's names are of, so that the others can be named as missing; None: of none.

    Args:
      names: of the tensors.
      paths: of the model's weights.
      num_experts: of a layer.
    """
    present = set(names)
    expected = {scheme: [n for path in paths for n in place(scheme, path, num_experts).names] for scheme in SCHEMES}
    known = {scheme: len(present.intersection(expected[scheme])) for scheme in SCHEMES}
    best = max(SCHEMES, key=known.__getitem__)
    return best if known[best] else None
