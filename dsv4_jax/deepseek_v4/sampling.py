"""How the next token comes of the logits: the likeliest one, or drawn by temperature and top-p, on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Hashable, so it can be a static argument.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_p: draw among the likeliest tokens that together have at least this probability; 1 = among all.

    Raises:
      ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")


def next_tokens(logits: jax.Array, seeds: jax.Array, positions: jax.Array, sampling: Sampling) -> jax.Array:
    """One token for each request.

    What is drawn depends on a request's own logits, seed and position alone: not on its row, nor on its company.

    Args:
      logits: fp32 [R, vocabulary].
      seeds: uint32 [R], of the requests.
      positions: int32 [R], of the tokens that the logits follow.
      sampling: how (static).

    Returns:
      int32 [R].
    """
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ordered = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    probabilities = jax.nn.softmax(ordered, axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities  # the probability of all before it
    # The first one always stays, whatever rounding makes of a top_p next to 0.
    kept = (likelier < sampling.top_p).at[:, 0].set(True)
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seeds, positions)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, ordered, -jnp.inf))
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
