"""A text, and the requests that read it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from dsv4_jax.deepseek_v4.serve import Request


def load_text(path: Path | None = None) -> str:
    """What is in a file of UTF-8, or the text that comes with the package.

    Raises:
      ValueError: it is empty, or not UTF-8.
    """
    file = path or resources.files("dsv4_jax.deepseek_v4").joinpath("default_text.txt")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if not text:
        raise ValueError(f"{path} is empty; give a file with some text in it")
    return text


def text_requests(
    tokens: Sequence[int],
    count: int,
    *,
    longest_prompt: int,
    new_tokens: int,
    seed: int,
    forced: bool = True,
    alike: bool = False,
) -> list[Request]:
    """``count`` requests over evenly spaced places in a text, with prompts of staggered lengths.

    Args:
      tokens: of the text; a request that reaches the end goes on from the start.
      count: how many requests.
      longest_prompt: prompts have from 3/7 of this to all of it tokens (with 700: 300 to 700).
      new_tokens: tokens after the prompt.
      seed: of the lengths; the requests' own seeds count on from it.
      forced: whether new tokens are the text's own; otherwise the model chooses them.
      alike: whether all prompts begin with the text's first tokens, 3/7 of ``longest_prompt``, and each goes on from a
        place of its own after these. They are as long as otherwise.
    """
    rng = np.random.default_rng(seed)
    shortest = max(1, longest_prompt * 3 // 7)
    common, requests = shortest * alike, []
    for index in range(count):
        prompt = int(rng.integers(shortest, longest_prompt, endpoint=True))
        place = common + index * len(tokens) // count
        places = np.append(np.arange(common), np.arange(place, place + prompt + new_tokens - common))
        read = np.take(np.asarray(tokens), places, mode="wrap").astype(np.int32)
        continuation = read[prompt:] if forced else None
        requests.append(Request(read[:prompt], new_tokens, continuation, (seed + index) % 2**32))
    return requests


def prompt_requests(prompts: Sequence[Sequence[int]], *, new_tokens: int, seed: int) -> list[Request]:
    """A request for each prompt's tokens; their seeds count on from ``seed``."""
    return [
        Request(np.asarray(prompt, np.int32), new_tokens, seed=(seed + index) % 2**32)
        for index, prompt in enumerate(prompts)
    ]
