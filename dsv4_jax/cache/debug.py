"""What a step with ``debug=True`` checks on the device's own numbers, when it runs.

A kernel skips what is out of range, since it has nobody to tell. Here the numbers are sent to the host, and an error
raised there stops the program: JAX reports it with the text below.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from dsv4_jax.cache.errors import StepError
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import LayerKind


def check_plan(plan: StepPlan, schema: CacheSchema) -> None:
    """Raises, when the step runs, StepError if an index of the plan is not one of the cache's; traced or not."""
    jax.debug.callback(functools.partial(_check_plan, layout=plan.layout, schema=schema), plan.packed)


def _check_plan(packed: Any, *, layout: PlanLayout, schema: CacheSchema) -> None:
    plan = StepPlan(np.asarray(packed), layout)
    limits = {
        "token_slot": (-1, schema.slots, "slots"),
        "token_position": (-1, schema.max_context, "max_context"),
        "token_request": (-1, layout.requests, "requests of the plan"),
        "request_slot": (-1, schema.slots, "slots"),
        "query_start": (0, layout.tokens + 1, "tokens of the plan, and their end"),
        "table_slot": (-1, schema.slots, "slots"),
        "table_index": (-1, schema.max_blocks, "places in the block table"),
        "table_block": (-1, schema.blocks, "blocks"),
    }
    found = []
    for name, (lowest, limit, what) in limits.items():
        values = getattr(plan, name)
        wrong = np.flatnonzero((values < lowest) | (values >= limit))
        if wrong.size:
            at = wrong[0]
            found.append(f"{name}[{at}] is {values[at]}, there are {limit} {what} ({wrong.size} such values)")
    if found:
        raise StepError("the plan of this step does not fit its cache: " + "; ".join(found) + ".")


def check_chunks(plan: StepPlan, schema: CacheSchema) -> None:
    """Raises, when the step runs, StepError if the ring has lost rows that tokens of the step still see."""
    jax.debug.callback(functools.partial(_check_chunks, layout=plan.layout, schema=schema), plan.packed)


def _check_chunks(packed: Any, *, layout: PlanLayout, schema: CacheSchema) -> None:
    plan = StepPlan(np.asarray(packed), layout)
    window, ring = schema.spec.window, schema.spec.window + schema.lookahead
    for request in np.flatnonzero(plan.request_slot >= 0):
        positions = plan.token_position[plan.query_start[request] : plan.query_start[request + 1]]
        if positions.size and max(0, positions[0] - window + 1) <= positions[-1] - ring:
            raise StepError(
                f"attend: request {request} of the plan brings {positions.size} tokens, more than a ring of {ring} "
                f"rows can take and still have the first one's window of {window}, and the plan's layout says that it "
                "displaces nothing: make the plan of one that does, as CacheManager.prepare_forward picks it."
            )


def check_layer(layer: jax.Array, kind: LayerKind, schema: CacheSchema) -> None:
    """Raises, when the step runs, StepError if a traced layer index is not that of a layer of this kind."""
    jax.debug.callback(functools.partial(_check_layer, kind=kind, schema=schema), layer)


def _check_layer(layer: Any, *, kind: LayerKind, schema: CacheSchema) -> None:
    layer, kinds = int(layer), schema.spec.layer_kinds
    if not 0 <= layer < len(kinds):
        raise StepError(f"step.layer: {schema.spec.name} has layers 0 to {len(kinds) - 1}, got {layer} on the device.")
    if kinds[layer] is not kind:
        raise StepError(f"step.layer: layer {layer} is {kinds[layer].name}, asked for as {kind.name} on the device.")
