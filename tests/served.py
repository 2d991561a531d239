"""A tiny checkpoint, servers over it, and requests, for the tests of serving and of verification."""

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import PROFILES, CacheFormats
from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.model import last_tokens
from dsv4_jax.deepseek_v4.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from dsv4_jax.deepseek_v4.serve import Request, Served, Server
from dsv4_jax.deepseek_v4.text import load_text, text_requests
from dsv4_jax.deepseek_v4.verify import Verification, verify
from dsv4_jax.deepseek_v4.weights import ModelWeights

# A layer of each kind that compresses; the first one looks its experts up.
TINY_CONFIG = dict(SMALL_CONFIG) | {
    "num_hidden_layers": 2,
    "compress_ratios": [4, 128],
    "num_nextn_predict_layers": 0,
    "num_hash_layers": 1,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "o_lora_rank": 32,
    "moe_intermediate_size": 64,
    "hc_sinkhorn_iters": 5,
}
EXACT = PROFILES["exact"]
VOCABULARY = 250  # of the tokens that tests make up, and that a cheap step can choose


@functools.cache
def model(seed: int) -> tuple[DeepseekV4Config, ModelWeights]:
    return model_of(TINY_CONFIG, seed)


def model_of(config: Mapping[str, Any], seed: int, **options: Any) -> tuple[DeepseekV4Config, ModelWeights]:
    """A random model, written and loaded with these options of ``load_checkpoint``."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_random_checkpoint(checkpoint, config, seed)
        return load_checkpoint(checkpoint, **options)


def make_server(formats: CacheFormats, seed: int, **options: Any) -> Server:
    options = {"slots": 2, "max_context": 384, "chunk": 96, "dtype": jnp.float32, "record": True} | options
    return Server(*model(seed), formats, **options)


def cheap_step(seed: int) -> Callable[..., Any]:
    """In place of ``serve.step``: logits that depend on a token and its position, and nothing else is written."""
    scores = jnp.asarray(np.random.default_rng(seed).standard_normal((VOCABULARY + 1, VOCABULARY)), jnp.float32)

    def step(weights, cache, plan, tokens, *, last, **_):
        columns = last_tokens(plan, last)
        return cache, jax.vmap(jnp.roll)(scores[tokens[columns]], plan.token_position[columns]), None

    return step


def make_requests(seed: int, *, count: int = 3, forced: bool = True) -> list[Request]:
    """Three, one more than there are slots, so that one slot is used twice."""
    text = list(load_text().encode())
    return text_requests(text, count, longest_prompt=330, new_tokens=12, seed=seed, forced=forced)


@functools.cache
def exact_server(seed: int) -> Server:
    """One server for many tests, which thereby also use its slots and blocks again and again."""
    return make_server(EXACT, seed)


@functools.cache
def exact_run(seed: int) -> tuple[Served, ...]:
    return tuple(exact_server(seed).serve(make_requests(seed)))


def check(server: Server, served: Sequence[Served], weights: ModelWeights | None = None) -> Verification:
    """What verification finds; with other weights than the server's if they are given."""
    result = verify(server, served, weights=weights)
    print(result)
    return result
