"""``DeepseekV4Config``: what a whole model is, read from a config.json in DeepSeek's or in Hugging Face's form.

What the cache needs of it is its ``spec``, read by ``dsv4_jax.model_spec``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from dsv4_jax import ConfigError, ModelSpec, deepseek_v4_flash, model_spec
from dsv4_jax.json_text import is_count, is_number, parse_json

Scoring = Literal["sqrtsoftplus", "sigmoid", "softmax"]


@dataclasses.dataclass(frozen=True)
class DeepseekV4Config:
    """A DeepSeek-V4 model. Hashable, so it can be a static argument.

    Attributes:
      spec: the attention geometry, which is what the cache needs; ``spec.norm_eps`` is that of every RMSNorm.
      vocabulary: token ids are 0 .. vocabulary - 1.
      q_lora_rank: width of the low-rank query, which the indexer shares.
      o_lora_rank: width of one group's low-rank output.
      o_groups: groups of heads in the output projection.
      hc_mult: residual streams.
      hc_sinkhorn_iters: normalizations of columns, and one less of rows, that make a mixing matrix doubly stochastic.
      hc_eps: added to mixing weights and to the sums that they are divided by.
      num_experts: routed experts of a layer; there is one shared expert beside them.
      experts_per_token: how many of them a token goes to.
      expert_width: inner width of every expert.
      scoring: what makes a score of a gate's product.
      norm_topk_prob: whether the scores of a token's experts are divided by their sum.
      routed_scaling: multiplies the routed experts' part.
      swiglu_limit: both halves of a SwiGLU are clamped to it: the gate's from above, the other from both sides.
      hashed: for every layer, whether a table gives each token id its experts, rather than score and bias.
      end_tokens: token ids that end a text; may be none.

    Raises:
      ConfigError: a value is out of range.
    """

    spec: ModelSpec
    vocabulary: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    routed_scaling: float
    swiglu_limit: float
    hashed: tuple[bool, ...]
    scoring: Scoring = "sqrtsoftplus"
    norm_topk_prob: bool = True
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not is_count(value):
                raise ConfigError(f"{self.spec.name}: {name} must be a positive integer below 2**31, got {value!r}.")
        for name in ("routed_scaling", "swiglu_limit", "hc_eps"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ConfigError(f"{self.spec.name}: {name} must be a positive number, got {value!r}.")
        if not isinstance(self.norm_topk_prob, bool):
            raise ConfigError(f"{self.spec.name}: norm_topk_prob must be true or false, got {self.norm_topk_prob!r}.")
        if not all(type(token) is int for token in self.end_tokens):
            raise ConfigError(f"{self.spec.name}: end_tokens must be token ids, got {self.end_tokens!r}.")
        if self.scoring not in get_args(Scoring):
            raise ConfigError(
                f"{self.spec.name}: scores are one of {', '.join(get_args(Scoring))}, got {self.scoring!r}."
            )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"{self.spec.name}: a token cannot go to {self.experts_per_token} of {self.num_experts} experts."
            )
        if self.spec.num_heads % self.o_groups:
            raise ConfigError(
                f"{self.spec.name}: {self.spec.num_heads} heads do not fall into {self.o_groups} equal groups."
            )
        if len(self.hashed) != len(self.spec.layers):
            raise ConfigError(
                f"{self.spec.name}: routing is given for {len(self.hashed)} layers of {len(self.spec.layers)}."
            )


_COUNTS = (
    "vocabulary",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "num_experts",
    "experts_per_token",
    "expert_width",
    "hc_mult",
    "hc_sinkhorn_iters",
)


def flash_config(*, num_experts: int = 256) -> DeepseekV4Config:
    """DeepSeek-V4-Flash, by default with all its experts; MTP layers are left out."""
    spec = deepseek_v4_flash()
    return DeepseekV4Config(
        spec=spec,
        vocabulary=129_280,
        q_lora_rank=1024,
        o_lora_rank=1024,
        o_groups=8,
        num_experts=num_experts,
        experts_per_token=6,
        expert_width=2048,
        routed_scaling=1.5,
        swiglu_limit=10.0,
        hashed=tuple(layer < 3 for layer in range(len(spec.layers))),
        end_tokens=(1,),
    )


def read_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> DeepseekV4Config:
    """Read a whole model's config, in DeepSeek's or in Hugging Face's form; MTP layers are left out.

    As with ``dsv4_jax.model_spec``, what every DeepSeek-V4 model shares may be left out of it, and what differs may
    not.

    Args:
      config: the parsed config, or the path of a config.json or of a folder that holds one.

    Raises:
      ConfigError: something is missing, out of range, or stated twice and differently.
      FileNotFoundError: there is no such file.
    """
    spec = model_spec(config)
    if not isinstance(config, Mapping):
        path = Path(config)
        config = parse_json((path / "config.json" if path.is_dir() else path).read_bytes())
        assert isinstance(config, Mapping)  # else model_spec had refused it
    for name, only in (("n_shared_experts", 1), ("tie_word_embeddings", False), ("hidden_act", "silu")):
        if _read(config, name, default=only) != only:
            raise ConfigError(f"{spec.name}: {name} is {config[name]!r}; this model is written for {only!r}.")
    ends = _read(config, "eos_token_id", default=())
    return DeepseekV4Config(
        spec=spec,
        vocabulary=_read(config, "vocab_size"),
        q_lora_rank=_read(config, "q_lora_rank"),
        o_lora_rank=_read(config, "o_lora_rank"),
        o_groups=_read(config, "o_groups"),
        num_experts=_read(config, "n_routed_experts", "num_local_experts"),
        experts_per_token=_read(config, "num_experts_per_tok", "n_activated_experts"),
        expert_width=_read(config, "moe_intermediate_size", "moe_inter_dim"),
        routed_scaling=_read(config, "routed_scaling_factor", "route_scale"),
        swiglu_limit=_read(config, "swiglu_limit"),
        hashed=_read_hashed(config, len(spec.layers)),
        scoring=_read(config, "scoring_func", "score_func", default="sqrtsoftplus"),
        norm_topk_prob=_read(config, "norm_topk_prob", default=True),
        hc_mult=_read(config, "hc_mult", default=4),
        hc_sinkhorn_iters=_read(config, "hc_sinkhorn_iters", default=20),
        hc_eps=_read(config, "hc_eps", default=1e-6),
        end_tokens=tuple(ends) if isinstance(ends, list | tuple) else (ends,),
    )


_REQUIRED: Any = object()


def _read(config: Mapping[str, Any], *names: str, default: Any = _REQUIRED) -> Any:
    """What the config says under any of these names, which must be one thing."""
    stated = {name: config[name] for name in names if config.get(name) is not None}
    if not stated and default is _REQUIRED:
        raise ConfigError(f"The config lacks {' or '.join(names)}.")
    if any(value != next(iter(stated.values())) for value in stated.values()):
        raise ConfigError(f"The config contradicts itself: {stated}.")
    return next(iter(stated.values()), default)


_HASHED_OF_TYPE = {"hash_moe": True, "moe": False}


def _read_hashed(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    stated = {}
    count = _read(config, "num_hash_layers", "n_hash_layers", default=None)
    if count is not None:
        if not (is_count(count) or (type(count) is int and count == 0)):
            raise ConfigError(f"num_hash_layers must be a number of layers, got {count!r}.")
        stated["num_hash_layers"] = tuple(layer < count for layer in range(layers))
    types = _read(config, "mlp_layer_types", default=None)
    if types is not None:
        known = isinstance(types, list | tuple) and all(
            isinstance(kind, str) and kind in _HASHED_OF_TYPE for kind in types
        )
        if not known or len(types) < layers:
            raise ConfigError(
                f"mlp_layer_types must give each of the {layers} layers one of {', '.join(_HASHED_OF_TYPE)}; "
                f"got {types!r}."
            )
        stated["mlp_layer_types"] = tuple(_HASHED_OF_TYPE[kind] for kind in types[:layers])
    if not stated:
        raise ConfigError("The config lacks num_hash_layers (DeepSeek's form) or mlp_layer_types (Hugging Face's).")
    if len(set(stated.values())) > 1:
        raise ConfigError(f"The config contradicts itself about which layers look their experts up: {stated}.")
    return next(iter(stated.values()))
