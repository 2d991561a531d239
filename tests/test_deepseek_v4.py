"""The whole model against Hugging Face's, in fp32: every logit of prefill, decode and mixtures, and greedy text.

``scripts/make_tiny_checkpoint.py`` made the checkpoint and what is expected of it.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import assert_in_place, compile_for_h200

from dsv4_jax import (
    PROFILES,
    CacheManager,
    CacheSchema,
    ConfigError,
    PlanLayout,
    StepPlan,
    deepseek_v4_flash,
    deepseek_v4_pro,
    init_cache,
    tiny_spec,
)
from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.model import logits, run_layers, step
from dsv4_jax.deepseek_v4.weights import ModelWeights
from dsv4_jax.layout.schema import TABLES

FOLDER = Path(__file__).parent / "data" / "tiny_deepseek_v4"
# Absolute; logits have a standard deviation of 1. Rounding in fp32 alone makes 4e-6 of it.
TOLERANCE = 2e-5


class Model(NamedTuple):
    config: DeepseekV4Config
    weights: ModelWeights

    def schema(self, formats: str = "exact") -> CacheSchema:
        return CacheSchema(self.config.spec, PROFILES[formats], slots=2, blocks=6, max_context=384)


@functools.cache
def expected() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "expected.npz") as file:
        return dict(file)


@functools.cache
def model(order: str) -> Model:
    """The checkpoint, with its layers in Flash's order, as stored, or in Pro's."""
    config, weights = load_checkpoint(FOLDER)
    if order == "flash":
        return Model(config, weights)
    layers = expected()["pro_layers"].tolist()
    spec = dataclasses.replace(config.spec, layers=tuple(config.spec.layers[layer] for layer in layers))
    hashed = tuple(config.hashed[layer] for layer in layers)
    weights = weights._replace(layers=tuple(weights.layers[layer] for layer in layers))
    return Model(dataclasses.replace(config, spec=spec, hashed=hashed), weights)


@functools.cache
def all_logits(order: str, **options):
    """A jitted step that returns the logits of every token."""
    config = model(order).config

    def run(weights, cache, plan, tokens):
        cache, streams, _ = run_layers(weights, cache, plan, tokens, config=config, **options)
        return cache, logits(weights, config, streams)

    return jax.jit(run, donate_argnums=1)


def serve(
    order: str,
    steps: Iterable[list[int]],
    buckets: tuple[int, ...],
    device: jax.Device,
    formats: str = "exact",
    **options,
):
    """Feed the prompts of ``expected`` in steps of so many tokens of each: the logits of all tokens, by request."""
    options = {"dtype": jnp.float32} | options
    chosen = model(order)
    weights = jax.device_put(chosen.weights, device)
    schema = chosen.schema(formats)
    manager, cache = CacheManager(schema, token_buckets=buckets), init_cache(schema)
    handles, done, made = [manager.admit(), manager.admit()], [0, 0], ([], [])
    for counts in steps:
        active = [request for request, count in enumerate(counts) if count]
        plan = manager.prepare_forward({handles[request]: counts[request] for request in active})
        parts = [expected()[f"tokens.{request}"][done[request] :][: counts[request]] for request in active]
        cache, found = all_logits(order, **options)(weights, cache, plan, plan.pack_tokens(parts))
        for row, request in enumerate(active):
            made[request].append(np.asarray(found)[plan.query_start[row] : plan.query_start[row + 1]])
            done[request] += counts[request]
    return [np.concatenate(part) for part in made if part]


def lengths() -> list[int]:
    return [len(expected()[f"tokens.{request}"]) for request in range(2)]


def ragged(rng: np.random.Generator, tokens: int, decoded: int = 8) -> list[list[int]]:
    """Prompts in pieces of many sizes that share steps, while one decodes already; the last tokens one by one."""
    left, steps = lengths(), []
    while any(left):
        room, counts = tokens, [0, 0]
        for request in rng.permutation(2):
            ahead = left[request] - decoded
            counts[request] = (
                int(min(rng.integers(0, room, endpoint=True), ahead)) if ahead > 0 else min(left[request], 1)
            )
            room -= counts[request]
        if any(counts):
            left = [there - count for there, count in zip(left, counts, strict=True)]
            steps.append(counts)
    return steps


def assert_hugging_faces(order: str, found: list[np.ndarray]) -> None:
    for request, ours in enumerate(found):
        theirs = expected()[f"{order}.logits.{request}"][: len(ours)]
        assert 0.9 < theirs.std() < 1.2
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
        best = theirs.max(axis=-1, keepdims=True)
        ties = (theirs == best).sum(axis=-1) > 1
        np.testing.assert_array_equal(ours.argmax(axis=-1)[~ties], theirs.argmax(axis=-1)[~ties])


@pytest.mark.parametrize(
    ("order", "options", "buckets"),
    [
        ("flash", {}, (2, 160)),
        ("pro", {}, (160,)),
        ("flash", {"attention": "gather"}, (160,)),
        ("pro", {"implementation": "reference"}, (64,)),
    ],
    ids=["flash", "pro", "gather", "reference"],
)
def test_ragged_prefill_and_decode(order, options, buckets, device, rng):
    steps = ragged(rng, buckets[-1] - 10)
    found = serve(order, steps, buckets, device, **options)
    assert [len(ours) for ours in found] == lengths()
    assert_hugging_faces(order, found)


def test_prefill_at_once(device):
    assert_hugging_faces("flash", serve("flash", [[lengths()[0], 0]], (lengths()[0],), device))


def test_decode_token_by_token(device):
    """From the first token on, both requests in step."""
    assert_hugging_faces("flash", serve("flash", [[1, 1]] * min(lengths()), (2, 160), device))


def test_greedy_text_without_a_retrace(device):
    """Hugging Face's tokens, in over 300 steps beside a neighbour that comes and goes, all of one trace."""
    chosen, text = model("flash"), expected()["flash.greedy"]
    weights = jax.device_put(chosen.weights, device)
    schema, traced = chosen.schema(), []
    manager, cache = CacheManager(schema, token_buckets=(2,)), init_cache(schema)
    prompt = len(text) - 16

    def counted(weights, cache, plan, tokens):
        traced.append(plan.layout)
        return step(weights, cache, plan, tokens, config=chosen.config, dtype=jnp.float32)

    run = jax.jit(counted, donate_argnums=1)
    handle, neighbour, read = manager.admit(), None, text[:prompt].tolist()
    while len(read) < len(text):
        fed = manager.length(handle)
        if fed % 60 == 30:
            if neighbour is None:
                neighbour = manager.admit()
            else:
                manager.release(neighbour)
                neighbour = None
        counts = {request: 1 for request in (handle, neighbour) if request is not None}
        plan, before = manager.prepare_forward(counts), cache
        cache, found, _ = run(weights, cache, plan, plan.pack_tokens([[read[fed]]] * len(counts)))
        assert all(array.is_deleted() for array in jax.tree.leaves(before))
        if fed == len(read) - 1:
            read.append(int(np.asarray(found)[0].argmax()))
    assert read == text.tolist()
    assert len(traced) == 1


def test_bfloat16_activations_and_a_quantized_cache(device):
    """As close as 8 bits of every activation and stored entries in fp8 and keys in fp4 go: 0.02 was measured."""
    (found,) = serve("flash", [[160, 0]], (160,), device, formats="default", dtype=jnp.bfloat16)
    theirs = expected()["flash.logits.0"][:160]
    assert np.sqrt(np.mean((found - theirs) ** 2)) < 0.08


def test_layers_have_the_published_order():
    """Flash begins with two sliding-window layers, Pro with two HCA layers; then CSA and HCA alternate."""
    for order, published in (("flash", deepseek_v4_flash()), ("pro", deepseek_v4_pro())):
        kinds = model(order).config.spec.layer_kinds
        assert kinds == published.layer_kinds[: len(kinds)]


def test_cache_of_another_model_is_refused():
    chosen = model("flash")
    schema = CacheSchema(tiny_spec(), PROFILES["exact"], slots=2, blocks=6, max_context=384)
    plan = CacheManager(schema, token_buckets=(2,)).prepare_forward({})
    with pytest.raises(ConfigError, match=r"config\.spec"):
        step(chosen.weights, init_cache(schema), plan, jnp.zeros(2, jnp.int32), config=chosen.config)


def shapes(layout: PlanLayout):
    """A step's arguments with pools that nothing else is as large as, shapes only."""
    chosen = model("flash")
    schema = CacheSchema(chosen.config.spec, PROFILES["default"], slots=512, blocks=1 << 16, max_context=1024)
    cache = jax.eval_shape(lambda: init_cache(schema))
    plan = StepPlan(jax.ShapeDtypeStruct((layout.size,), jnp.int32), layout)
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), chosen.weights)
    return weights, cache, plan, jax.ShapeDtypeStruct((layout.tokens,), jnp.int32)


def smallest_pool(cache) -> int:
    sizes = cache.memory_bytes()
    return min(size for name, size in sizes.items() if name not in (*TABLES, "window_positions"))


LAYOUT = pytest.mark.parametrize(
    "layout", [PlanLayout(8, 8, displaces=False), PlanLayout(200, 8)], ids=["decode", "prefill"]
)


@LAYOUT
def test_in_place_on_the_cpu(layout):
    given = shapes(layout)
    run = functools.partial(step, config=model("flash").config)
    compiled = jax.jit(run, donate_argnums=1).lower(*given).compile()
    assert_in_place(compiled, given[1], temporary_bytes=smallest_pool(given[1]) - 1)


@LAYOUT
def test_in_place_on_an_h200(layout, tmp_path):
    given = shapes(layout)
    run = functools.partial(step, config=model("flash").config)
    gpu = compile_for_h200(run, *given, dump=tmp_path, donate_argnums=1)
    # XLA gives the matrix products a workspace of 32 MiB together.
    assert_in_place(gpu.compiled, given[1], temporary_bytes=2**25 + smallest_pool(given[1]) - 1)
