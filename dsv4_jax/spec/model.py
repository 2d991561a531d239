"""ModelSpec: what the cache has to know about a model."""

from __future__ import annotations

import dataclasses
import functools

from dsv4_jax.errors import Picklable
from dsv4_jax.json_text import is_count, is_number
from dsv4_jax.spec.kinds import HEAD_DIM, KEY_DIM, ROPE_DIM, LayerKind

# fp32 holds every position up to here exactly; rotary angles are fp32 products of a position.
LARGEST_POSITION = 2**24


class ConfigError(Picklable, ValueError):
    """A model description that is incomplete, contradicts itself, or that the kernels are not built for."""


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of a layer: plain, or stretched by YaRN.

    Attributes:
      theta: base of the frequencies.
      factor: how many times longer the context was made (YaRN); 1 = no YaRN, and the next three say nothing.
      original_max_position: context length in tokens before it was made longer.
      beta_fast: channels that turn more often than this over the original context keep their frequency.
      beta_slow: channels that turn less often than this are slowed down by ``factor``.
      dim: rotated channels, the trailing ones of a head; two for every frequency.
      attention_factor: cos and sin are multiplied by it. 1 in every published model; YaRN's own is
        0.1 ln(factor) + 1, which Hugging Face computes for a config that names no other in its nested form.

    Raises:
      ConfigError: a value is out of range.
    """

    theta: float
    factor: float = 1.0
    original_max_position: int = 65536
    beta_fast: float = 32
    beta_slow: float = 1
    dim: int = ROPE_DIM
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        in_range = {
            "theta > 1": is_number(self.theta) and self.theta > 1,
            "factor >= 1": is_number(self.factor) and self.factor >= 1,
            "original_max_position >= 1": is_count(self.original_max_position),
            "beta_fast >= beta_slow > 0": is_number(self.beta_fast)
            and is_number(self.beta_slow)
            and self.beta_fast >= self.beta_slow > 0,
            "an even dim >= 2": is_count(self.dim) and self.dim % 2 == 0,
            "attention_factor > 0": is_number(self.attention_factor) and self.attention_factor > 0,
        }
        for expected, holds in in_range.items():
            if not holds:
                raise ConfigError(f"{self} is no rotary embedding: it needs {expected}.")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One attention layer: what it caches, and the rotary embedding of its queries, window rows and entries."""

    kind: LayerKind
    rope: RopeSpec


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The attention geometry of a DeepSeek-V4 model.

    Attributes:
      name: for people to read; two specs that differ in nothing else are equal.
      hidden_size: width of the residual stream.
      num_heads: query heads (there is one key/value head).
      head_dim: channels of a head, an entry and a window row: 512.
      rope_dim: trailing channels of a head that are rotated: 64.
      index_num_heads: indexer query heads; 0 is allowed only without CSA layers.
      index_head_dim: channels of an indexer key: 128.
      index_topk: entries that a query of a CSA layer selects; 0 is allowed only without CSA layers.
      window: tokens a query sees uncompressed, itself included.
      norm_eps: epsilon of every RMSNorm.
      max_position: longest context in tokens.
      layers: one ``LayerSpec`` per layer, the MTP layers last if they are included.

    Raises:
      ConfigError: a value is out of range, or the kernels are not built for it.
    """

    name: str = dataclasses.field(compare=False)
    hidden_size: int
    num_heads: int
    head_dim: int
    rope_dim: int
    index_num_heads: int
    index_head_dim: int
    index_topk: int
    window: int
    norm_eps: float
    max_position: int
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ConfigError(f"a model's name must be text, got {self.name!r}.")
        for name, built in (("head_dim", HEAD_DIM), ("rope_dim", ROPE_DIM), ("index_head_dim", KEY_DIM)):
            if getattr(self, name) != built:
                raise ConfigError(f"{self.name}: {name} is {getattr(self, name)!r}; the kernels are built for {built}.")
        if not self.layers:
            raise ConfigError(f"{self.name}: a model has at least one layer, got none.")
        for layer, layer_spec in enumerate(self.layers):
            if layer_spec.rope.dim != self.rope_dim:
                raise ConfigError(
                    f"{self.name}: layer {layer} rotates {layer_spec.rope.dim} channels, rope_dim is {self.rope_dim}."
                )
        counts = ["hidden_size", "num_heads", "window", "max_position"]
        if self.count(LayerKind.CSA):
            counts += ["index_num_heads", "index_topk"]
        for name in (*counts, "index_num_heads", "index_topk"):
            value = getattr(self, name)
            unused = name not in counts and value == 0 and isinstance(value, int)
            if not (is_count(value) or unused):
                raise ConfigError(f"{self.name}: {name} must be a positive integer below 2**31, got {value!r}.")
        if self.max_position > LARGEST_POSITION:
            raise ConfigError(
                f"{self.name}: max_position is {self.max_position}; rotary angles are fp32 products of the position, "
                f"and fp32 counts only to {LARGEST_POSITION}."
            )
        if not (is_number(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(f"{self.name}: norm_eps must be a positive number, got {self.norm_eps!r}.")

    @functools.cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        return tuple(layer.kind for layer in self.layers)

    def count(self, kind: LayerKind) -> int:
        """How many layers are of this kind."""
        return self.layer_kinds.count(kind)

    def kind_index(self, layer: int) -> int:
        """The index of a layer among the layers of its kind, which is its place in that kind's pools.

        Raises:
          IndexError: ``layer`` is negative or not less than the number of layers.
        """
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"{self.name} has layers 0 to {len(self.layers) - 1}, got {layer}.")
        return self.layer_kinds[:layer].count(self.layers[layer].kind)
