"""Rotary position embedding: frequencies, the cos and sin of a step's positions, and their application.

Angles are fp32 products of an fp32 position and an fp32 frequency, as in DeepSeek's and Hugging Face's code: against
exact angles they are off by up to 0.03 rad at a million tokens, so an implementation that computes them better computes
something else. cos and sin differ between maths libraries in their last bits; computed once per step, here, and handed
to every layer, they are the same wherever a step uses them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.spec.model import RopeSpec

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32

Purpose = Literal["tokens"] | tuple[Literal["closing"], int]
"""Whose positions they are: the step's tokens, or its closing entries of so many tokens each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """The cos and sin of n positions, and what they are for.

    In a decode step the tokens' and the closing entries' have equal shapes; ``purpose`` tells them apart while tracing.

    Attributes:
      cos: fp32 [n, dim / 2], cosine of the angle of every position and pair of channels, times the attention factor.
      sin: fp32 [n, dim / 2], the sine, times the attention factor.
      purpose: "tokens" (``token_rotary``), ("closing", ratio) (``closing_rotary``), or None: of any positions, which
        rotates with ``apply_rotary`` and is refused in ``RawRows`` and ``CompressorInputs``.
      rope: the embedding they were made with; None for cos and sin that were made elsewhere.
    """

    cos: Float32[Array, "n pairs"]
    sin: Float32[Array, "n pairs"]
    purpose: Purpose | None = dataclasses.field(default=None, metadata={"static": True})
    rope: RopeSpec | None = dataclasses.field(default=None, metadata={"static": True})

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.cos, self.sin))


def inverse_frequencies(rope: RopeSpec) -> np.ndarray:
    """Radians per token of every pair of channels.

    fp32 arithmetic in torch's order of operations, with correctly rounded powers. torch's own powers are a unit in the
    last place off for some theta, not the same ones on every processor, and then its frequencies are off by one unit
    or two. For the thetas of the published models, 1e4 and 1.6e5, all agree to the bit.

    Plain: ``theta ** (-2 i / dim)``. YaRN (arXiv 2309.00071, section 3.2, "NTK-by-parts", bounds rounded outward):
    pairs that turn more than ``beta_fast`` times over the original context keep that, pairs that turn less
    than ``beta_slow`` times are divided by ``factor``, and a linear ramp over the pair's index joins the two.

    Returns:
      fp32 [dim / 2].
    """
    one = np.float32(1)
    pairs = np.arange(rope.dim // 2, dtype=np.float32)
    exponents = 2 * pairs / np.float32(rope.dim)
    # Rounded once, from float64: NumPy's own fp32 power is off by an ulp here and there.
    periods = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    kept = one / periods
    if rope.factor == 1:
        return kept
    slowed = one / (np.float32(rope.factor) * periods)
    first = max(math.floor(_pair_turning(rope, rope.beta_fast)), 0)
    last = min(math.ceil(_pair_turning(rope, rope.beta_slow)), rope.dim - 1)
    # Where the two bounds meet, Hugging Face puts them this far apart.
    length = np.float32(last - first if last != first else 0.001)
    keep = one - np.clip((pairs - np.float32(first)) / length, 0, one)
    return slowed * (one - keep) + kept * keep


def _pair_turning(rope: RopeSpec, turns: float) -> float:
    """The (fractional) index of the pair that turns this many times over the original context."""
    return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def rotary(positions: jax.Array, rope: RopeSpec) -> Rotary:
    """The cos and sin of positions, times the attention factor of the rotary embedding.

    Args:
      positions: integers [n]; a negative one is padding and gets what position 0 gets, angle 0.
      rope: the layer's rotary embedding.

    Returns:
      ``Rotary`` of two fp32 [n, dim / 2].

    Raises:
      ValueError: ``positions`` are no integers [n].
    """
    positions = jnp.asarray(positions)
    if positions.ndim != 1 or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"rotary needs integer positions [n], got {positions.dtype} {positions.shape}.")
    angles = jnp.maximum(positions, 0).astype(jnp.float32)[:, None] * inverse_frequencies(rope)[None, :]
    factor = np.float32(rope.attention_factor)
    return Rotary(jnp.cos(angles) * factor, jnp.sin(angles) * factor, rope=rope)


def apply_rotary(
    x: Float[Array, "n ... width"], rotary: Rotary, *, inverse: bool = False
) -> Float[Array, "n ... width"]:
    """Rotate the trailing channels of x in interleaved pairs (2k, 2k + 1).

    Args:
      x: [n, ..., width], any float type; row i belongs to position i of ``rotary``, whatever axes follow (heads).
      rotary: cos and sin [n, pairs] with 2 * pairs <= width.
      inverse: rotate by the opposite angle. That is back only where the attention factor is 1; another factor
        multiplies once more, as it does in Hugging Face's code.

    Returns:
      x's shape and dtype; computed in fp32, the leading ``width - 2 * pairs`` channels as they were.

    Raises:
      ValueError: the shapes do not fit.
    """
    rows, pairs = rotary.cos.shape
    if rotary.sin.shape != (rows, pairs) or x.ndim < 2 or x.shape[0] != rows or x.shape[-1] < 2 * pairs:
        raise ValueError(
            "apply_rotary needs x [n, ..., width] with cos and sin [n, pairs] and width >= 2 * pairs; "
            f"got x {x.shape}, cos {rotary.cos.shape}, sin {rotary.sin.shape}."
        )
    shape = (rows, *(1,) * (x.ndim - 2), pairs)
    cos, sin = rotary.cos.reshape(shape), rotary.sin.reshape(shape)
    if inverse:
        sin = -sin
    start = x.shape[-1] - 2 * pairs
    even, odd = x[..., start::2].astype(jnp.float32), x[..., start + 1 :: 2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    rotated = rotated.reshape(*x.shape[:-1], 2 * pairs).astype(x.dtype)
    return jnp.concatenate([x[..., :start], rotated], axis=-1)
