"""Text as byte tokens, and the requests that read it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.example.serve import Request


def load_text(path: Path | None = None) -> NDArray[np.uint8]:
    """The bytes of a file, or of the text that comes with the package. Raises ValueError if there are none."""
    data = path.read_bytes() if path else resources.files("dsv4_jax.example").joinpath("default_text.txt").read_bytes()
    if not data:
        raise ValueError(f"{path} is empty; give a file with some text in it")
    return np.frombuffer(data, np.uint8)


def text_requests(
    text: NDArray[np.uint8], count: int, *, longest_prompt: int, new_tokens: int, seed: int, greedy: bool = False
) -> list[Request]:
    """``count`` requests over evenly spaced places in the text, with prompts of staggered lengths.

    Args:
      text: what is read; a request that reaches the end goes on from the start.
      count: how many requests.
      longest_prompt: prompts have from 3/7 of this to all of it tokens (with the default of 700: 300 to 700).
      new_tokens: tokens after the prompt.
      seed: of the lengths.
      greedy: let the model choose the new tokens; otherwise they are the text's own.
    """
    rng = np.random.default_rng(seed)
    shortest = max(1, longest_prompt * 3 // 7)
    requests = []
    for index in range(count):
        prompt = int(rng.integers(shortest, longest_prompt, endpoint=True))
        place = index * len(text) // count
        tokens = np.take(text, np.arange(place, place + prompt + new_tokens), mode="wrap").astype(np.int32)
        continuation = None if greedy else tokens[prompt:]
        requests.append(Request(tokens[:prompt], new_tokens, continuation))
    return requests
