"""``model_spec``: a ``ModelSpec`` read from a config.json.

Two forms of config are read. DeepSeek's carries ``compress_ratios``, one number per layer (0 = sliding window only,
4 = CSA, 128 = HCA), with more values than layers for the multi-token prediction (MTP) layers. Hugging Face's
``save_pretrained`` writes ``layer_types``, ``compress_rates`` and ``rope_parameters``; an older flat form of it has
``compress_rate_csa``, ``compress_rate_hca`` and ``rope_scaling``. A fact that a config states twice must be the same
both times. Nothing is guessed about the layers: Hugging Face's default ``layer_types`` describes no published model.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv4_jax.json_text import is_count, is_number, parse_json
from dsv4_jax.spec.kinds import HEAD_DIM, KEY_DIM, KIND_OF_RATIO, ROPE_DIM, LayerKind
from dsv4_jax.spec.model import ConfigError, LayerSpec, ModelSpec, RopeSpec

_KIND_OF_TYPE = {
    "sliding_attention": LayerKind.SWA,
    "compressed_sparse_attention": LayerKind.CSA,
    "heavily_compressed_attention": LayerKind.HCA,
}


def model_spec(config: Mapping[str, Any] | str | os.PathLike[str], *, include_mtp: bool = False) -> ModelSpec:
    """Read a model's geometry from its config, in DeepSeek's or in Hugging Face's form.

    The geometry that every DeepSeek-V4 model shares may be left out: head_dim 512, rope dim 64, index head dim 128,
    sliding window 128, norm epsilon 1e-6, 1,048,576 positions, rope theta 1e4 and 1.6e5, one key/value head. What
    differs between models may not: the layers, the hidden size, the numbers of heads, the indexer's top-k, and whether
    CSA and HCA layers use YaRN (``rope_scaling``, or ``null`` for none).

    Args:
      config: the parsed config, or the path of a config.json or of a folder that holds one.
      include_mtp: whether the MTP layers get a cache too: all layers that are listed beyond ``num_hidden_layers``.
        ``num_nextn_predict_layers`` does not count them: published configs list three and say 1.

    Raises:
      ConfigError: something is missing, unknown, or stated twice and differently; the message names each statement.
      FileNotFoundError: there is no such file.
    """
    name = "deepseek_v4"
    if not isinstance(config, Mapping):
        name = _file_of(config).resolve().parent.name or name
        config = load_config(config)
    kinds = _read_kinds(config, include_mtp=include_mtp)
    readers = {kind: _read_main_rope if kind is LayerKind.SWA else _read_compress_rope for kind in LayerKind}
    ropes = {kind: readers[kind](config) for kind in dict.fromkeys(kinds)}
    _agreed({"num_key_value_heads": _read(config, "num_key_value_heads", default=1), "every DeepSeek-V4 model": 1})
    indexer_default = _REQUIRED if LayerKind.CSA in kinds else 0
    head_dim = _read(config, "head_dim", default=HEAD_DIM)
    return ModelSpec(
        name=_read(config, "_name_or_path", default="") or name,
        hidden_size=_read(config, "hidden_size", "dim"),
        num_heads=_read(config, "num_attention_heads", "n_heads"),
        head_dim=head_dim,
        rope_dim=_read_rope_dim(config, head_dim),
        index_num_heads=_read(config, "index_n_heads", default=indexer_default),
        index_head_dim=_read(config, "index_head_dim", default=KEY_DIM),
        index_topk=_read(config, "index_topk", default=indexer_default),
        window=_read(config, "sliding_window", "window_size", default=128),
        norm_eps=_read(config, "rms_norm_eps", "norm_eps", default=1e-6),
        max_position=_read(config, "max_position_embeddings", default=1_048_576),
        layers=tuple(LayerSpec(kind, ropes[kind]) for kind in kinds),
    )


_REQUIRED: Any = object()


def _file_of(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / "config.json" if path.is_dir() else path


def load_config(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The JSON object in a config.json, or in that of a folder.

    Raises:
      ConfigError: it is something else, or names something twice.
      FileNotFoundError: there is no such file.
    """
    path = _file_of(path)
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no model config at {path}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON, or not as a config is: {error}.") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path} holds a {type(config).__name__}; a model config is a JSON object.")
    return config


def _find(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where it, or a section on the way to it, is missing or null."""
    parent, _, name = path.rpartition(".")
    section = _section(config, parent) if parent else config
    return None if section is None else section.get(name)


def _section(config: Mapping[str, Any], path: str) -> Mapping[str, Any] | None:
    """The section at a dotted path; None where it is missing or null."""
    section = _find(config, path)
    if section is None or isinstance(section, Mapping):
        return section
    raise ConfigError(f"{path} is {section!r}; it must be a section of names and values, or null.")


def _agreed(statements: Mapping[str, Any]) -> Any:
    (first, value), *others = statements.items()
    for other, other_value in others:
        if other_value != value:
            raise ConfigError(f"The config contradicts itself: {first} says {value!r}, {other} says {other_value!r}.")
    return value


def _read(config: Mapping[str, Any], *paths: str, default: Any = _REQUIRED) -> Any:
    statements = {path: value for path in paths if (value := _find(config, path)) is not None}
    if statements:
        return _agreed(statements)
    if default is _REQUIRED:
        raise ConfigError(f"The config lacks {' or '.join(paths)}.")
    return default


def _read_rope_dim(config: Mapping[str, Any], head_dim: Any) -> Any:
    statements = {path: _find(config, path) for path in ("qk_rope_head_dim", "rope_head_dim")}
    for parent in ("", "rope_parameters.main.", "rope_parameters.compress."):
        fraction = _find(config, f"{parent}partial_rotary_factor")
        if is_number(fraction) and is_number(head_dim):
            product = fraction * head_dim
            rotated = int(product) if is_number(product) else product
            statements[f"{parent}partial_rotary_factor of head_dim {head_dim}"] = rotated
    statements = {path: value for path, value in statements.items() if value is not None}
    return _agreed(statements) if statements else ROPE_DIM


def _read_kinds(config: Mapping[str, Any], *, include_mtp: bool) -> list[LayerKind]:
    """The kind of every layer wanted, from every description that the config has."""
    for kind, rates in (
        (LayerKind.CSA, ("compress_rates.compressed_sparse_attention", "compress_rate_csa")),
        (LayerKind.HCA, ("compress_rates.heavily_compressed_attention", "compress_rate_hca")),
    ):
        rate = _read(config, *rates, default=kind.ratio)
        if rate != kind.ratio:
            raise ConfigError(
                f"The config compresses {rate!r} tokens into one {kind.name} entry ({' or '.join(rates)}); "
                f"the kernels are built for {kind.ratio}."
            )
    layers = _read(config, "num_hidden_layers", "n_layers")
    if not is_count(layers):
        raise ConfigError(f"num_hidden_layers must be a positive integer below 2**31, got {layers!r}.")
    described = {}
    for path, known in (("compress_ratios", KIND_OF_RATIO), ("layer_types", _KIND_OF_TYPE)):
        values = _find(config, path)
        if values is None:
            continue
        if not isinstance(values, list | tuple):
            raise ConfigError(f"{path} must be a list, got {values!r}.")
        if len(values) < layers:
            raise ConfigError(f"{path} lists {len(values)} layers, num_hidden_layers says {layers}.")
        for layer, value in enumerate(values):
            if not isinstance(value, int | str) or value is True or value is False or value not in known:
                raise ConfigError(
                    f"{path} gives layer {layer} {value!r}; the kernels are built for {', '.join(map(repr, known))} "
                    "(sliding window only, CSA, HCA)."
                )
        described[path] = [known[value] for value in values]
    if not described:
        raise ConfigError("The config lacks compress_ratios (DeepSeek's form) or layer_types (Hugging Face's form).")
    if len(described) == 2:
        for layer, (by_ratio, by_type) in enumerate(zip(*described.values(), strict=False)):
            _agreed({f"compress_ratios[{layer}]": by_ratio.name, f"layer_types[{layer}]": by_type.name})
    kinds = max(described.values(), key=len)
    if include_mtp and len(kinds) == layers:
        raise ConfigError(
            f"include_mtp asks for the MTP layers, but {' and '.join(described)} describes only the {layers} layers "
            "before them. DeepSeek's config.json lists them last in compress_ratios."
        )
    return kinds if include_mtp else kinds[:layers]


def _read_main_rope(config: Mapping[str, Any]) -> RopeSpec:
    """The rotary embedding of SWA-only layers."""
    top_theta = _read(config, "rope_theta", default=10_000.0)
    stated = {}
    for path, flat, nested in _rope_sections(config):
        if nested:
            # A top-level theta beside this one is a leftover of the config that was saved.
            theta = _read(nested["main"], "rope_theta", default=top_theta)
            stated[f"{path}.main"] = _stated_rope(nested["main"], theta, f"{path}.main", without_factor=None)
        else:
            # Hugging Face passes a flat section's theta over, so it may not say anything else.
            said = "rope_theta" if config.get("rope_theta") is not None else "rope_theta's default"
            _agreed({said: top_theta, f"{path}.rope_theta": _read(flat, "rope_theta", default=top_theta)})
            stated[path] = RopeSpec(top_theta)
    return _agreed(stated) if stated else RopeSpec(top_theta)


def _read_compress_rope(config: Mapping[str, Any]) -> RopeSpec:
    """The rotary embedding of CSA and HCA layers."""
    top_theta = _read(config, "compress_rope_theta", default=160_000.0)
    stated = {}
    for path, flat, nested in _rope_sections(config):
        if nested:
            if (theta := nested["compress"].get("rope_theta")) is None:
                # Hugging Face takes the SWA-only layers' theta here, which nobody who leaves it out can mean.
                raise ConfigError(f"{path}.compress lacks rope_theta.")
            stated[f"{path}.compress"] = _stated_rope(
                nested["compress"], theta, f"{path}.compress", without_factor=None
            )
        else:
            stated[path] = _stated_rope(flat, top_theta, path, without_factor=1.0)
    length = _find(config, "original_seq_len")
    if length is not None:
        # DeepSeek's inference code spells YaRN flat, and turns it off with a length of 0.
        path, rope = "original_seq_len with rope_factor", RopeSpec(top_theta)
        if length:
            yarn = {"factor": _read(config, "rope_factor"), "original_max_position_embeddings": length}
            rope = _yarn({**config, **yarn}, top_theta, path, without_factor=1.0)
        stated[path] = rope
    if not stated and "rope_scaling" not in config:
        raise ConfigError(
            "The config lacks rope_scaling (or rope_parameters.compress), which says how CSA and HCA layers stretch "
            "their rotary embedding; rope_scaling: null says that they do not."
        )
    return _agreed(stated) if stated else RopeSpec(top_theta)


def _rope_sections(
    config: Mapping[str, Any],
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Mapping[str, Any]]]]:
    """The path of every section about rotary embeddings, the section, and its two parts, none if it is flat."""
    for path in ("rope_parameters", "rope_scaling"):
        section = _section(config, path)
        if section is None:
            continue
        parts = {label: _section(config, f"{path}.{label}") for label in ("main", "compress")}
        nested = {label: part for label, part in parts.items() if part is not None}
        if len(nested) == 1:
            # Hugging Face passes a single one over and reads no YaRN.
            raise ConfigError(f"{path} has a part {', '.join(nested)} alone; it needs {' and '.join(parts)}.")
        yield path, section, nested


def _stated_rope(section: Mapping[str, Any], theta: float, path: str, *, without_factor: float | None) -> RopeSpec:
    """What a section of the config says; ``without_factor`` as for ``_yarn``."""
    kind = _read(section, "rope_type", "type", default=None)
    if kind is None and (settings := sorted(_YARN_SETTINGS & section.keys())):
        raise ConfigError(f"{path} has {', '.join(settings)} and no type; add type: yarn, or null for no stretching.")
    if kind not in (None, "default", "yarn"):
        raise ConfigError(f"{path} asks for rope type {kind!r}; known are 'default' (plain) and 'yarn'.")
    return _yarn(section, theta, path, without_factor=without_factor) if kind == "yarn" else RopeSpec(theta)


_YARN_SETTINGS = {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


def _yarn(section: Mapping[str, Any], theta: float, path: str, *, without_factor: float | None) -> RopeSpec:
    """YaRN as a section describes it.

    ``without_factor`` is the attention factor of a section that does not name one: 1 in DeepSeek's forms, and None,
    YaRN's own, where Hugging Face's form has the two parts. A factor of ``null`` is YaRN's own everywhere.
    """
    if section.get("truncate") is False:
        raise ConfigError(f"{path} asks for truncate: false; neither DeepSeek's nor Hugging Face's V4 knows it.")
    missing = [name for name in ("factor", "original_max_position_embeddings") if section.get(name) is None]
    if missing:
        raise ConfigError(f"{path} asks for YaRN and lacks {' and '.join(missing)}.")
    attention_factor = section.get("attention_factor", without_factor)
    rope = RopeSpec(
        theta,
        factor=section["factor"],
        original_max_position=section["original_max_position_embeddings"],
        beta_fast=_read(section, "beta_fast", default=32),
        beta_slow=_read(section, "beta_slow", default=1),
    )
    if attention_factor is None:
        attention_factor = _yarn_attention_factor(section, path)
    return dataclasses.replace(rope, attention_factor=attention_factor)


def _yarn_attention_factor(section: Mapping[str, Any], path: str) -> float:
    """YaRN's own attention factor (arXiv 2309.00071, equation 22): 0.1 ln(factor) + 1, or a ratio of two such."""
    logarithm = 0.1 * math.log(section["factor"])
    scale, scale_all = _scale(section, "mscale", path), _scale(section, "mscale_all_dim", path)
    if not (scale and scale_all):
        return logarithm + 1.0
    if not (divisor := scale_all * logarithm + 1.0):
        raise ConfigError(f"{path} has mscale_all_dim {scale_all!r}, by which YaRN's attention factor is infinite.")
    return (scale * logarithm + 1.0) / divisor


def _scale(section: Mapping[str, Any], name: str, path: str) -> float:
    scale = _read(section, name, default=0.0)
    if not is_number(scale):
        raise ConfigError(f"{path} has {name} {scale!r}; it must be a number.")
    return scale
