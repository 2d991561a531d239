"""Step: one step on its way through the layers. ``begin`` starts it, ``layer`` hands out its layers, ``end`` ends it.

Which layers have been written travels in the static part of the pytree, where it costs nothing and is known while JAX
traces. So a layer that is written twice, or whose writes were lost because an old step went on, raises before anything
runs; and since nothing is changed in place, functions that JAX traces more than once (branches of ``lax.cond``, bodies
of loops) see the same each time.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dsv4_jax import ops
from dsv4_jax.cache import debug as run_time
from dsv4_jax.cache.errors import StepError, WrongLayerKind
from dsv4_jax.cache.layer import LayerCache
from dsv4_jax.cache.layer_state import parts_of
from dsv4_jax.cache.pools import Cache, check_one_shard
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops import Implementation
from dsv4_jax.spec.kinds import LayerKind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step between ``begin`` and ``end``: ``step.layer(i)`` is given to layer i, and ``layer.step`` goes on.

    A pytree, so it passes ``jit``, ``scan`` and ``checkpoint``; there is nothing in it but arrays and static facts.

    Attributes:
      cache: the arrays, as the step's writes have left them so far; ``end`` returns them once all layers are written.
      plan: the step's, in a buffer of the compiled step: its address stays, so that XLA need not update its CUDA graph.
      implementation: who runs the ops.
      debug: whether indices that are known only on the device are checked there.
      written: (layer, part) of all that was written, see ``parts_of``; None in a step for scans over layers.
    """

    cache: Cache
    plan: StepPlan
    implementation: Implementation = dataclasses.field(default="native", metadata={"static": True})
    debug: bool = dataclasses.field(default=False, metadata={"static": True})
    written: frozenset[tuple[int, str]] | None = dataclasses.field(default=frozenset(), metadata={"static": True})

    @property
    def schema(self) -> CacheSchema:
        """What the cache looks like."""
        return self.cache.schema

    def layer(self, layer: Any, *, kind: LayerKind | None = None) -> LayerCache:
        """What an attention layer is given to write and read its part of the cache.

        Args:
          layer: index of the layer in the model, from 0. In a step from ``scanning`` it may be a traced int32 scalar;
            then a layer that does not exist, or is of another kind, writes nothing and reads nothing.
          kind: the layer's kind; needed only where ``layer`` is traced, since it decides what is compiled.

        Raises:
          IndexError: there is no such layer.
          WrongLayerKind: the layer is not of that kind, or the model has no layer of it.
          StepError: ``layer`` is traced and the step is not from ``scanning``, or no kind is given.
          TypeError: ``layer`` is no integer.
        """
        if isinstance(layer, Tracer):
            return self._traced_layer(layer, kind)
        if isinstance(layer, bool):
            raise TypeError(f"a layer is an integer, got {layer!r}.")
        layer = operator.index(layer)
        found = self.schema.layer(layer).kind
        if kind is not None and kind is not found:
            raise WrongLayerKind(f"layer {layer} is {found.name}, asked for as {kind.name}.")
        written = frozenset(part for other, part in self.written or () if other == layer)
        return LayerCache(self, found, layer, written=written)

    def _traced_layer(self, layer: jax.Array, kind: LayerKind | None) -> LayerCache:
        if self.written is not None:
            raise StepError(
                "step.layer: the index is traced, so this step cannot count which layers were written. In a scan over "
                "layers, carry step.scanning() and take step.layer(i, kind=...) from it."
            )
        if kind is None:
            raise StepError("step.layer: the index is traced; say what kind of layers it runs over: kind=LayerKind.…")
        if not self.schema.spec.count(kind):
            raise WrongLayerKind(f"{self.schema.spec.name} has no {kind.name} layers.")
        if self.debug:
            run_time.check_layer(layer, kind, self.schema)
        return LayerCache(self, kind, None, traced=layer)

    def scanning(self) -> Step:
        """The step for scans over layers: ``layer`` takes a traced index, and what was written is not counted.

        A scan's carry looks the same before and after its body, so no layer can be ticked off in it. ``end`` then takes
        the step as it is.
        """
        return dataclasses.replace(self, written=None)

    def end(self, *, partial: bool = False) -> Cache:
        """The cache after the step, for the next one.

        Args:
          partial: the step writes only some of the layers, on purpose. The others then hold nothing of its tokens.

        Raises:
          StepError: a layer was not written, or not all of it. Its update was forgotten, or what it returned was not
            gone on with (``step = layer.step``).
        """
        if self.written is None or partial:
            return self.cache
        kinds = self.schema.spec.layer_kinds
        missing = {
            layer: lost
            for layer, kind in enumerate(kinds)
            if (lost := [part for part in parts_of(kind) if (layer, part) not in self.written])
        }
        if missing:
            shown = "; ".join(f"layer {layer} ({kinds[layer].name}): {', '.join(p)}" for layer, p in missing.items())
            raise StepError(
                f"the step ends with {len(missing)} of {len(kinds)} layers not written. What is missing: "
                f"{shown if len(missing) <= 8 else shown[:200] + ' …'}. Update every layer, and go on with what that "
                "returns (layer = layer.update(…); step = layer.step); a step that writes only some of the layers ends "
                "with step.end(partial=True)."
            )
        return self.cache


def begin(cache: Cache, plan: StepPlan, *, implementation: Implementation = "native", debug: bool = False) -> Step:
    """Begins a step: resets slots with a new owner, hands out blocks, as the plan says.

    Args:
      cache: as the last step left it; donate it to the jitted function that this is called in.
      plan: of this step, from ``CacheManager.prepare_forward``.
      implementation: who runs the ops.
      debug: check on the device what cannot be known while tracing: the plan's slots, places in the block table, block
        ids and positions, and traced layer indices. What is out of range raises when the step runs, named; otherwise it
        writes nothing, in silence. Off, it costs nothing.

    Raises:
      StepError: the plan is of another schema's manager, or of several steps.
      ShardingError: the cache lies on several devices, and this is not inside ``jax.shard_map``.
      ValueError: an array does not have the shape or dtype that ``cache.schema`` says, or there is no such
        implementation.
    """
    check_one_shard(cache)
    _check_plan(cache.schema, plan)
    if debug:
        run_time.check_plan(plan, cache.schema)
    block_table, write_table, window_positions, plan = ops.begin_step(
        cache.block_table, cache.write_table, cache.window_positions, plan, implementation=implementation
    )
    cache = cache.with_arrays(
        {"block_table": block_table, "write_table": write_table, "window_positions": window_positions}
    )
    return Step(cache, plan, implementation, bool(debug))


def _check_plan(schema: CacheSchema, plan: StepPlan) -> None:
    if plan.layout.fingerprint not in ("", schema.fingerprint):
        raise StepError(
            "the plan names slots and blocks of another cache: its manager's schema has the fingerprint "
            f"{plan.layout.fingerprint}, this cache's {schema.fingerprint}. Make both of one schema."
        )
    shape, size = jnp.shape(plan.packed), plan.layout.size
    if len(shape) == 2 and shape[1] == size:
        raise StepError(
            f"the plan is of {shape[0]} steps (packed {list(shape)}): begin each step with its own, by a lax.scan over "
            "the plan or with plan.step(i)."
        )
    if shape != (size,):
        raise StepError(
            f"the plan is packed {list(shape)}, its layout says [{size}]: the plans of several shards lie side by "
            "side, and are split by jax.shard_map, inside of which each shard begins its own step."
        )
