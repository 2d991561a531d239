"""How far each cache format moves the logits of the tiny checkpoint from Hugging Face's fp32, printed as a table:

    python scripts/compare_formats.py

Every logit of both prompts of tests/data/tiny_deepseek_v4, prefilled in chunks, in float32 and bfloat16 activations.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import dsv4_jax as dsv4
from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.model import logits, run_layers
from dsv4_jax.deepseek_v4.weights import ModelWeights

FOLDER = Path(__file__).parent.parent / "tests" / "data" / "tiny_deepseek_v4"
CHUNK = 96


def cached_logits(
    config: DeepseekV4Config, weights: ModelWeights, formats: dsv4.CacheFormats, dtype: Any, prompt: np.ndarray
) -> np.ndarray:
    """fp32 [tokens, vocabulary], computed through a cache of these formats."""

    def step(cache: dsv4.Cache, plan: dsv4.StepPlan, tokens: jax.Array) -> tuple[dsv4.Cache, jax.Array]:
        cache, streams, _ = run_layers(weights, cache, plan, tokens, config=config, dtype=dtype)
        return cache, logits(weights, config, streams)

    schema = dsv4.CacheSchema(config.spec, formats, slots=1, blocks=4, max_context=512)
    manager, cache = dsv4.CacheManager(schema, token_buckets=[CHUNK]), dsv4.init_cache(schema)
    request, run, made = manager.admit(), jax.jit(step, donate_argnums=0), []
    for start in range(0, len(prompt), CHUNK):
        chunk = prompt[start : start + CHUNK]
        plan = manager.prepare_forward({request: len(chunk)})
        cache, found = run(cache, plan, plan.pack_tokens([chunk]))
        made.append(np.asarray(found)[: len(chunk)])
    return np.concatenate(made)


def main() -> None:
    """Print the table."""
    config, weights = load_checkpoint(FOLDER)
    with np.load(FOLDER / "expected.npz") as file:
        expected = dict(file)
    table = Table("cache", "activations", "rms", "largest", "same argmax", title="Logits against Hugging Face's fp32")
    for name, formats in dsv4.PROFILES.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            off, same = [], []
            for request in range(2):
                found = cached_logits(config, weights, formats, dtype, expected[f"tokens.{request}"])
                theirs = expected[f"flash.logits.{request}"]
                off.append((found - theirs).ravel())
                same.append(found.argmax(-1) == theirs.argmax(-1))
            difference, agreed = np.concatenate(off), np.concatenate(same)
            rms, largest = np.sqrt(np.mean(difference**2)), np.abs(difference).max()
            table.add_row(name, jnp.dtype(dtype).name, f"{rms:.1e}", f"{largest:.1e}", f"{agreed.mean():.1%}")
    console = Console()
    console.print(table)
    platform = jax.devices()[0].device_kind
    console.print(f"{len(agreed)} positions, logits of standard deviation {theirs.std():.2f}, on {platform}.")


if __name__ == "__main__":
    main()
