"""Quantized weights: pytrees of codes and scales that stay as they are in device memory and are expanded in a step.

A weight is ``[..., out, in]``; the leading axes, if any, are experts. ``expand`` is arithmetic on codes and scales,
element by element, which XLA fuses into one pass: it reads the codes and writes the expanded weight, nothing else.
``quantize_block_fp8``, ``quantize_packed_fp4`` and ``quantize_nvfp4`` make them, on the host. E2M1 codes lie two in a
byte, the low nibble being the even column; a UE8M0 scale is the byte b for 2^(b - 127), 255 for NaN.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, NDArray

FP8_BLOCK = 128
FP4_GROUP = 32
NVFP4_GROUP = 16

_E4M3, _E2M1 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float4_e2m1fn)
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_E4M3_SMALLEST = 2.0**-9
_AMAX_FLOOR = 2.0**-100  # of a block of zeros: every scale made from it is a normal number


class _Arrays:
    """What every quantized weight has beside its arrays, which are the fields of a dataclass."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockFp8(_Arrays):
    """E4M3 codes with one scale for every 128 x 128 block; the last blocks of a row or column may be smaller.

    Attributes:
      codes: float8_e4m3fn [..., out, in].
      scales: [..., ceil(out / 128), ceil(in / 128)], uint8 (UE8M0) or float32.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the expanded weight, [..., out, in]."""
        return self.codes.shape

    def expand(self, dtype: Any) -> jax.Array:
        """The weight, ``dtype`` [..., out, in].

        The product is taken in float32: exact with UE8M0 scales, in bfloat16 too, unless it is below 2^-126, which
        arithmetic may take for zero. With float32 scales it is rounded to float32, then to ``dtype``.
        """
        out, columns = self.shape[-2:]
        scales = _scale_values(self.scales)
        scales = jnp.repeat(scales, FP8_BLOCK, axis=-2)[..., :out, :]
        scales = jnp.repeat(scales, FP8_BLOCK, axis=-1)[..., :columns]
        return (self.codes.astype(jnp.float32) * scales).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedFp4(_Arrays):
    """E2M1 codes with one UE8M0 scale for 32 columns of a row.

    Attributes:
      codes: uint8 [..., out, in / 2].
      scales: uint8 [..., out, in / 32].
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the expanded weight, [..., out, in]."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def expand(self, dtype: Any) -> jax.Array:
        """The weight, ``dtype`` [..., out, in]: exact, unless below 2^-126, which arithmetic may take for zero."""
        return _times_groups(_unpacked_e2m1(self.codes), _scale_values(self.scales), FP4_GROUP).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nvfp4(_Arrays):
    """E2M1 codes with one E4M3 scale for 16 columns of a row, in units of one float32 number for the matrix.

    Attributes:
      codes: uint8 [..., out, in / 2].
      scales: float8_e4m3fn [..., out, in / 16].
      global_scale: float32 [...].
    """

    codes: jax.Array
    scales: jax.Array
    global_scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the expanded weight, [..., out, in]."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def expand(self, dtype: Any) -> jax.Array:
        """The weight, ``dtype`` [..., out, in]: code times (scale times global scale), each rounded to float32, then
        to ``dtype``.
        """
        scales = self.scales.astype(jnp.float32) * self.global_scale[..., None, None]
        return _times_groups(_unpacked_e2m1(self.codes), scales, NVFP4_GROUP).astype(dtype)


def _scale_values(scales: jax.Array) -> jax.Array:
    """Scales as float32, from UE8M0 bytes (uint8) or float32."""
    if scales.dtype != jnp.uint8:
        return scales
    return lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu).astype(jnp.float32)


def _unpacked_e2m1(codes: jax.Array) -> jax.Array:
    """E2M1 values of packed codes: uint8 [..., n / 2] -> float32 [..., n]."""
    nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1).astype(jnp.uint16)
    # Exponent and fraction go where a float16 has its last exponent bits and its first fraction bit. What is missing is
    # the difference of the two biases, 14, for the numbers below the normal ones too.
    bits = (nibbles & 7) << 9 | (nibbles & 8) << 12
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * np.float32(2.0**14)


def _times_groups(values: jax.Array, scales: jax.Array, group: int) -> jax.Array:
    """[..., n] times a scale for every ``group`` columns."""
    groups = values.reshape(*values.shape[:-1], -1, group)
    return (groups * scales[..., None]).reshape(values.shape)


def quantize_block_fp8(weight: ArrayLike, *, scale_dtype: Any = np.uint8) -> BlockFp8:
    """E4M3 with a scale per 128 x 128 block, amax / 448: a power of two not below it, or the float32 itself.

    Args:
      weight: [..., out, in], finite.
      scale_dtype: uint8 (UE8M0) or float32.

    Returns:
      Arrays of NumPy; ``jax.device_put`` moves them. Codes are the weight divided by its scale, rounded to nearest.
    """
    rows = np.asarray(weight, np.float32)
    *_, out, columns = rows.shape
    grid = -(-out // FP8_BLOCK), -(-columns // FP8_BLOCK)
    edges = [(0, 0)] * (rows.ndim - 2) + [
        (0, n * FP8_BLOCK - size) for n, size in zip(grid, (out, columns), strict=True)
    ]
    blocks = np.pad(rows, edges).reshape(*rows.shape[:-2], grid[0], FP8_BLOCK, grid[1], FP8_BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=(-3, -1)), _AMAX_FLOOR) / np.float32(_E4M3_MAX)
    stored, scales = (scales, scales) if np.dtype(scale_dtype) == np.float32 else _power_of_two_above(scales)
    blocks = np.clip(blocks / scales[..., :, None, :, None], -_E4M3_MAX, _E4M3_MAX)
    codes = blocks.reshape(*rows.shape[:-2], grid[0] * FP8_BLOCK, grid[1] * FP8_BLOCK)[..., :out, :columns]
    return BlockFp8(_host(codes.astype(_E4M3)), _host(stored))


def quantize_packed_fp4(weight: ArrayLike) -> PackedFp4:
    """E2M1 with a UE8M0 scale per 32 columns: the power of two not below amax / 6.

    Args:
      weight: [..., out, in], finite; ``in`` a multiple of 32.

    Returns:
      Arrays of NumPy.
    """
    groups = _groups(weight, FP4_GROUP)
    stored, scales = _power_of_two_above(np.maximum(np.abs(groups).max(-1), _AMAX_FLOOR) / np.float32(_E2M1_MAX))
    return PackedFp4(_host(_packed_e2m1(groups / scales[..., None])), _host(stored))


def quantize_nvfp4(weight: ArrayLike) -> Nvfp4:
    """NVFP4: the global scale of a matrix is amax / (6 x 448), the scale of 16 columns their amax / 6 in its units.

    Args:
      weight: [..., out, in], finite; ``in`` a multiple of 16.

    Returns:
      Arrays of NumPy.
    """
    groups = _groups(weight, NVFP4_GROUP)
    amax = np.abs(groups).max(-1)
    global_scale = np.maximum(amax.max((-2, -1)), _AMAX_FLOOR) / np.float32(_E2M1_MAX * _E4M3_MAX)
    scales = amax / np.float32(_E2M1_MAX) / global_scale[..., None, None]
    scales = np.clip(scales, _E4M3_SMALLEST, _E4M3_MAX).astype(_E4M3)
    units = scales.astype(np.float32) * global_scale[..., None, None]
    return Nvfp4(_host(_packed_e2m1(groups / units[..., None])), _host(scales), _host(global_scale))


def _groups(weight: ArrayLike, group: int) -> NDArray[np.float32]:
    """[..., n] -> [..., n / group, group]."""
    rows = np.asarray(weight, np.float32)
    if rows.shape[-1] % group:
        raise ValueError(f"A weight of {rows.shape[-1]} columns cannot be cut into groups of {group}.")
    return rows.reshape(*rows.shape[:-1], -1, group)


def _power_of_two_above(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The UE8M0 bytes of the smallest powers of two not below x, and the powers."""
    fraction, exponent = np.frexp(x)  # x = fraction 2^exponent with fraction in [0.5, 1)
    exponent = exponent - (fraction == 0.5)
    return (exponent + 127).astype(np.uint8), np.ldexp(np.float32(1), exponent)


def _packed_e2m1(groups: NDArray[np.float32]) -> NDArray[Any]:
    """float32 [..., groups, size], at most 6 but for rounding, as packed codes [..., n / 2]."""
    codes = groups.astype(_E2M1).view(np.uint8)
    codes = codes.reshape(*groups.shape[:-2], -1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _host(array: NDArray[Any]) -> Any:
    """An array of NumPy where a pytree says jax.Array: JAX takes either, and only device_put moves it."""
    return array


def scaled_matmul(x: jax.Array, weight: Nvfp4) -> jax.Array:
    """``x @ weight.T`` by ``jax.nn.scaled_matmul``, which multiplies NVFP4 by NVFP4: x is quantized, too.

    An option for Blackwell GPUs, where cuDNN multiplies the codes as they are; it was never run there. The step itself
    expands the weights instead, which is exact in x.

    Args:
      x: [tokens, in], finite; quantized by the rule of ``quantize_nvfp4``, each token with its own global scale.
      weight: [out, in], no leading axes.

    Returns:
      float32 [tokens, out].

    Raises:
      NotImplementedError: JAX has no ``scaled_matmul`` for this platform, as for the CPU.
    """
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, NVFP4_GROUP)
    amax = jnp.abs(groups).max(-1)
    global_scale = jnp.maximum(amax.max(-1), _AMAX_FLOOR) / (_E2M1_MAX * _E4M3_MAX)
    scales = jnp.clip(amax / _E2M1_MAX / global_scale[:, None], _E4M3_SMALLEST, _E4M3_MAX).astype(_E4M3)
    units = scales.astype(jnp.float32) * global_scale[:, None]
    codes = jnp.clip(groups / units[..., None], -_E2M1_MAX, _E2M1_MAX).astype(_E2M1).reshape(x.shape)
    weight_codes = lax.bitcast_convert_type(weight.codes, _E2M1).reshape(weight.shape)
    product = jax.nn.scaled_matmul(codes[None], weight_codes[None], scales[None], weight.scales[None])[0]
    return product * global_scale[:, None] * weight.global_scale
