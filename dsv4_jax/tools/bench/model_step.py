"""The decode step of a whole model: DeepSeek-V4-Flash with random weights in the release's formats, and as many of its
experts as the device has memory for. In the tiny scale a small model.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache.pools import Cache, init_cache
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops import Implementation
from dsv4_jax.tools.bench.attended_step import placed_cache, step_traffic
from dsv4_jax.tools.bench.measure import MOST_REPLAYS, NoFigureError, Outcome, native_calls
from dsv4_jax.tools.bench.step import compile_step, time_dispatches
from dsv4_jax.tools.bench.trace import Op, Spent, profiled
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import Scale, admit, schema_of

if TYPE_CHECKING:
    from dsv4_jax.deepseek_v4.config import DeepseekV4Config
    from dsv4_jax.deepseek_v4.weights import ModelWeights

EXPERTS_STEP = 16
"""Of experts a model has a multiple of this."""

_TRIAL_SECONDS = 1.0
_FREE_SHARE = 0.1  # of the device's memory, for a step's temporaries, what is being made, and gaps between arrays


class ModelState(NamedTuple):
    """What a step takes from the one before; donate it."""

    cache: Cache
    tokens: jax.Array  # int32 [T], of the step: the likeliest after each request's last one
    experts: jax.Array  # int32 [layers, T, experts per token], chosen in the step before


def model_step(state: ModelState, plan: StepPlan, weights: ModelWeights, *, config: DeepseekV4Config) -> ModelState:
    """One token of every request through the model, and the likeliest next ones, all on the device."""
    from dsv4_jax.deepseek_v4.model import step

    cache, logits, choices = step(weights, state.cache, plan, state.tokens, config=config)
    return ModelState(cache, logits.argmax(axis=-1).astype(jnp.int32), choices.experts)


def model_config(scale: Scale) -> DeepseekV4Config:
    """The model of a scale, with as many experts as fit beside the largest of its caches.

    Raises:
      NoFigureError: not even a few experts fit.
    """
    from dsv4_jax.deepseek_v4.config import flash_config, read_config
    from dsv4_jax.deepseek_v4.random_checkpoint import SMALL_CONFIG

    if scale.name != "full":
        return read_config({**SMALL_CONFIG, "num_hidden_layers": 2, "compress_ratios": [4, 128], "num_hash_layers": 1})
    config = flash_config()
    schema = model_schema(config, max(scale.model_batches), max(scale.model_contexts))
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return config
    left = int(limit * (1 - _FREE_SHARE)) - schema.memory_bytes
    few, more = (_total_bytes(flash_config(num_experts=count)) for count in (EXPERTS_STEP, 2 * EXPERTS_STEP))
    fitting = (left - few) // (more - few) + 1
    if fitting < 1:
        raise NoFigureError(
            f"no room: {config.spec.name} with {EXPERTS_STEP} experts takes {few:,} bytes, its cache "
            f"{schema.memory_bytes:,}, and {limit:,} are there"
        )
    return flash_config(num_experts=min(fitting * EXPERTS_STEP, config.num_experts))


def model_schema(config: DeepseekV4Config, requests: int, context: int) -> CacheSchema:
    """A cache for requests of so many tokens, and of a few hundred more, which the steps bring."""
    return schema_of(config.spec, requests, -(-context // 128) * 128 + 256)


def whole_model(requests: int, context: int, scale: Scale, implementation: Implementation) -> Outcome:
    """Microseconds of a decode step, planned on the host and dispatched as in a server, back to back.

    The cache has room for the longest contexts, so that one compilation serves all of them.

    Remarks: tokens per second, what of the model there is, experts that a layer's tokens went to on average, CUDA
    graphs, native calls, and megabytes of temporaries. Bytes are those of the weights, without experts that no token
    went to, and of the cache.
    """
    from dsv4_jax.deepseek_v4.random_weights import random_weights

    config, full = model_config(scale), scale.name == "full"
    trials, most = (5, MOST_REPLAYS) if full else (1, 3)
    planned = 3 + (most + most // 3) * (trials + 1)
    schema = model_schema(config, requests, max(scale.model_contexts))
    compiled, graphs, compile_seconds = _compiled(config, schema)
    weights = random_weights(config)
    manager, batch = _requests(schema, context, planned)
    first = manager.prepare_forward(batch)
    state = _state(config, placed_cache(schema, first))
    state = jax.block_until_ready(compiled(state, first, weights))

    def seconds(dispatches: int) -> tuple[float, float]:
        nonlocal state
        begun = time.perf_counter()
        for _ in range(dispatches):
            state = compiled(state, manager.prepare_forward(batch), weights)
        dispatched = time.perf_counter()
        jax.block_until_ready(state)
        return time.perf_counter() - begun, dispatched - begun

    estimate = seconds(2)[0] / 2
    replays = int(np.clip(_TRIAL_SECONDS / estimate, 3, most))
    timing = time_dispatches(seconds, replays, trials, compile_seconds=compile_seconds)
    chosen = [len(np.unique(of_layer)) for of_layer in np.asarray(state.experts)]
    memory = compiled.memory_analysis()
    shape = StepShape(np.array(first.token_position[:requests], np.int64), np.ones(requests, np.int64))
    return Outcome(
        timing,
        {
            "tokens_per_second": round(requests / timing.microseconds * 1e6, 1),
            "layers": len(config.spec.layers),
            "experts": config.num_experts,
            "experts_per_token": config.experts_per_token,
            "experts_chosen": round(float(np.mean(chosen)), 1),
            "weight_bytes": _bytes(weights),
            "cache_bytes": schema.memory_bytes,
            "cuda_graphs": graphs,
            "native_calls": native_calls(compiled),
            "temporary_megabytes": None if memory is None else round(memory.temp_size_in_bytes / 1e6, 2),
        },
        bytes_moved=_moved(weights, chosen) + step_traffic(schema, shape)[0],
        reads=True,
    )


def trace_model(
    folder: Path, config: DeepseekV4Config, schema: CacheSchema, *, steps: int, context: int
) -> dict[Op, Spent]:
    """As ``trace_steps``, of the whole model.

    Args:
      folder: where the profile goes.
      config: of the model.
      schema: of its cache, with a slot for each token of a step.
      steps: how many steps are traced; as many run before, untraced.
      context: tokens of each request, about.
    """
    from dsv4_jax.deepseek_v4.random_weights import random_weights

    manager, batch = _requests(schema, context, 2 * steps)
    plans = [manager.prepare_forward(batch) for _ in range(2 * steps)]
    run = functools.partial(model_step, config=config)
    return profiled(folder, run, _state(config, placed_cache(schema, plans[0])), plans, random_weights(config))


def _requests(schema: CacheSchema, context: int, planned: int) -> tuple[CacheManager, tuple[np.ndarray, np.ndarray]]:
    """A manager, and a token for each of its requests, which reach ``context`` tokens after half of the steps.

    They are evenly spread over the windows' phases.
    """
    manager = CacheManager(schema, token_buckets=(schema.slots, schema.max_context))
    lengths = max(context - 64 - planned // 2, 1) + np.arange(schema.slots) * 128 // schema.slots
    return manager, (admit(manager, lengths), np.ones(schema.slots, np.int64))


def _state(config: DeepseekV4Config, cache: Cache) -> ModelState:
    """Before the first step; every request begins with another token."""
    slots = cache.schema.slots
    experts = jnp.zeros((len(config.spec.layers), slots, config.experts_per_token), jnp.int32)
    return ModelState(cache, jnp.arange(slots, dtype=jnp.int32), experts)


@functools.lru_cache(maxsize=1)
def _compiled(config: DeepseekV4Config, schema: CacheSchema) -> tuple[jax.stages.Compiled, int | None, float]:
    """The step, compiled before any weight is there: contexts share it."""
    from dsv4_jax.deepseek_v4.random_weights import random_weights

    layout = CacheManager(schema, token_buckets=(schema.slots, schema.max_context)).layouts[0]
    plan = StepPlan(jax.ShapeDtypeStruct((layout.size,), jnp.int32), layout)
    state = jax.eval_shape(lambda: _state(config, init_cache(schema)))
    weights = jax.eval_shape(lambda: random_weights(config))
    return compile_step(functools.partial(model_step, config=config), state, plan, weights)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _total_bytes(config: DeepseekV4Config) -> int:
    from dsv4_jax.deepseek_v4.random_weights import random_weights

    return _bytes(jax.eval_shape(lambda: random_weights(config)))


def _moved(weights: ModelWeights, chosen: list[int]) -> int:
    """Bytes of the weights that a step reads, if the tokens of each layer went to so many experts."""
    total = _bytes(weights) - _bytes(weights.embed)
    for layer, count in zip(weights.layers, chosen, strict=True):
        experts = _bytes(layer.ffn.experts)
        total -= experts - experts // layer.ffn.experts.gate.shape[0] * count + _bytes(layer.ffn.token_experts)
    return total
