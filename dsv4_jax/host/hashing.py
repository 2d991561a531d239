"""Match: a prompt, hashed once, block by block: what ``match_prefix`` returns and ``admit`` takes."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.spec.kinds import BLOCK_TOKENS

BLOCK_TOKEN = np.dtype("<i4")
"""A token as it is hashed, whatever the machine's byte order."""


class Link(NamedTuple):
    """A block of a chain.

    Attributes:
      hash: of the block's tokens and of all before them.
      tokens: the block's 128 tokens, int32.
    """

    hash: bytes
    tokens: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A prompt and what of it was in the cache when it was looked up.

    Attributes:
      length: tokens that a request admitted with it would not have to compute, a multiple of 128; ``admit`` looks
        again.
      stored: tokens whose entries are in the cache: ``length``, or more where the state there was not kept. Then those
        from ``length`` on are computed again to rebuild it, and nothing of them is stored but that.
      tokens: int32 [n], the prompt.
      salt: what tells equal tokens of different tenants apart.
      root: what the salt comes to, the hash before the first block.
      links: of the prompt's full blocks.
    """

    length: int
    stored: int
    tokens: NDArray[np.int32]
    salt: bytes
    root: bytes
    links: tuple[Link, ...]


def root_of(salt: bytes) -> bytes:
    """The hash that chains with this salt begin from."""
    return hashlib.sha256(b"dsv4_jax prefix" + salt).digest()


def link_after(parent: bytes, tokens: bytes) -> Link:
    """The block of these tokens that follows another one."""
    return Link(hashlib.sha256(parent + tokens).digest(), tokens)


def chain(tokens: ArrayLike, salt: Any) -> tuple[NDArray[np.int32], bytes, tuple[Link, ...]]:
    """A prompt as int32 [n], its root and its full blocks.

    Raises:
      TypeError: tokens are not integers [n], or the salt is not bytes.
      ValueError: a token is no int32.
    """
    if not isinstance(salt, bytes):
        raise TypeError(f"salt must be bytes, got {salt!r}")
    ids = token_array("tokens", tokens)
    data, parent = ids.astype(BLOCK_TOKEN).tobytes(), root_of(salt)
    root, size, links = parent, BLOCK_TOKENS * BLOCK_TOKEN.itemsize, []
    for start in range(0, len(data) // size * size, size):
        links.append(link_after(parent, data[start : start + size]))
        parent = links[-1].hash
    return ids, root, tuple(links)


def token_array(name: str, tokens: ArrayLike) -> NDArray[np.int32]:
    """Token ids as int32 [n]; raises TypeError and ValueError."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(f"{name} must be integers [n], got {ids.dtype} {list(ids.shape)}")
    if ids.size and (ids.min() < -(2**31) or ids.max() >= 2**31):
        raise ValueError(f"{name} must be int32, got {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


def tokens_of(link: Link) -> NDArray[np.int32]:
    """int32 [128]: the tokens of a block."""
    return np.frombuffer(link.tokens, BLOCK_TOKEN).astype(np.int32)
