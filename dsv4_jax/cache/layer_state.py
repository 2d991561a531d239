"""LayerState: which arrays of the cache are a layer's, which of their rows, and what of it the step has written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

from dsv4_jax.cache.errors import StepError, WrongLayerKind
from dsv4_jax.cache.pools import Cache
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops.attend.operands import Displaced
from dsv4_jax.spec.kinds import LayerKind
from dsv4_jax.spec.rotary import Purpose, Rotary

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

    from dsv4_jax.cache.step import Step

APPEND, FLUSH, FLUSH_KEYS = "append", "flush", "flush_keys"


def parts_of(kind: LayerKind) -> tuple[str, ...]:
    """What is to be written of a layer in every step, by the method that writes it; ``update`` writes all of it."""
    if kind.compression is None:
        return (APPEND,)
    return (APPEND, FLUSH, FLUSH_KEYS) if kind.compression.indexed else (APPEND, FLUSH)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerState:
    """One layer's part of the cache during one step.

    Attributes:
      step: goes on to the next layer; with what this layer has written.
      kind: the layer's kind.
      layer: index of the layer in the model; None where it is traced.
      traced: the traced index, int32 scalar.
      written: the parts of the layer that were written, see ``parts_of``.
      displaced: window rows that the step took the place of and that its tokens still see, for ``attend``; None where
        the plan's layout says that there are none.
    """

    step: Step
    kind: LayerKind = dataclasses.field(metadata={"static": True})
    layer: int | None = dataclasses.field(metadata={"static": True})
    traced: Any = None
    written: frozenset[str] = dataclasses.field(default=frozenset(), metadata={"static": True})
    displaced: Displaced | None = None

    @property
    def plan(self) -> StepPlan:
        """The step's."""
        return self.step.plan

    @property
    def schema(self) -> CacheSchema:
        """What the cache looks like."""
        return self.step.schema

    @property
    def visible(self) -> Int32[Array, " tokens"]:
        """int32 [tokens]: how many entries each token sees, ``(position + 1) // ratio``; 0 for padding."""
        self._name_of("entries")
        return (jnp.asarray(self.plan.token_position) + 1) // self.kind.ratio

    @property
    def _cache(self) -> Cache:
        return self.step.cache

    @property
    def _by(self) -> dict[str, Any]:
        return {"implementation": self.step.implementation}

    @property
    def _name(self) -> str:
        return f"a {self.kind.name} layer" if self.layer is None else f"layer {self.layer} ({self.kind.name})"

    @property
    def _window_row(self) -> Any:
        return self._row("window")

    @property
    def _kind_row(self) -> Any:
        return self._row("compressed")

    def _row(self, pool: str) -> Any:
        if self.layer is not None:
            return getattr(self.schema.rows(self.layer), pool)
        rows = [
            getattr(self.schema.rows(layer), pool) if kind is self.kind else -1
            for layer, kind in enumerate(self.schema.spec.layer_kinds)
        ]
        return _look_up(rows, self.traced)

    def _with(self, **arrays: jax.Array) -> Self:
        cache = self._cache.with_arrays(arrays)
        return dataclasses.replace(self, step=dataclasses.replace(self.step, cache=cache))

    def _written(self, *parts: str) -> Self:
        """The handle with these parts ticked off."""
        again = [part for part in parts if part in self.written]
        if again:
            raise StepError(
                f"{self._name}: {', '.join(again)} a second time in one step, asked by "
                f"{'update' if len(parts) > 1 else again[0]}; a layer is "
                "written once, by update or by append, flush and flush_keys."
            )
        step = self.step
        if step.written is not None and self.layer is not None:
            step = dataclasses.replace(step, written=step.written | {(self.layer, part) for part in parts})
        return dataclasses.replace(self, step=step, written=self.written | set(parts))

    def _name_of(self, component: str) -> str:
        """The name in ``Cache.pools`` of one of the kind's arrays: entries, keys, tail or key_tail."""
        compression = self.kind.compression
        if compression is None:
            raise WrongLayerKind(f"{self._name} has no {component}; only layers that compress their context do.")
        if component.startswith("key") and not compression.indexed:
            raise WrongLayerKind(f"{self._name} has no indexer; only CSA layers do.")
        return f"{self.kind.value}_{component}"

    def _require_written(self, part: str, read: str) -> None:
        if part in parts_of(self.kind) and part not in self.written:
            raise StepError(
                f"{self._name}: {read} before {part} (or update) would read without what this step's tokens "
                "bring; write the layer first, and read from what that returns."
            )

    def _check_rotary(self, name: str, rotary: Rotary, purpose: Purpose) -> None:
        spec = self.schema.spec
        layers = range(len(spec.layers)) if self.layer is None else (self.layer,)
        ropes = {spec.layers[layer].rope for layer in layers if spec.layers[layer].kind is self.kind}
        wanted = "token_rotary(plan, rope)" if purpose == "tokens" else f"closing_rotary(plan, {self.kind.ratio}, rope)"
        if rotary.purpose != purpose:
            raise StepError(
                f"{self._name}: the rotary of {name} is for {_shown(rotary.purpose)}, expected that for "
                f"{_shown(purpose)}: {wanted}."
            )
        if rotary.rope is not None and rotary.rope not in ropes:
            raise StepError(
                f"{self._name}: the rotary of {name} was made with {rotary.rope}, the layer has "
                f"{' or '.join(map(str, ropes))}: {wanted} with the rope of spec.layers[layer]."
            )


def _look_up(rows: Sequence[int], layer: jax.Array) -> jax.Array:
    """The row of a traced layer, -1 for a layer that does not exist."""
    if list(rows) == list(range(len(rows))):
        return layer  # every layer is its own row, and kernels skip what is out of range
    found = jnp.asarray(rows, jnp.int32)[jnp.clip(layer, 0, len(rows) - 1)]
    return jnp.where((layer >= 0) & (layer < len(rows)), found, -1)


def _shown(purpose: Purpose | None) -> str:
    if purpose is None:
        return "positions of no known purpose"
    return "the step's tokens" if purpose == "tokens" else f"closing entries of {purpose[1]} tokens"
