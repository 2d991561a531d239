"""A weight as it lies in the files: its format, checked against the model, and how a part of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError
from dsv4_jax.deepseek_v4.names import Place, scale_names
from dsv4_jax.deepseek_v4.quantized import FP4_GROUP, FP8_BLOCK, BlockFp8, Nvfp4, PackedFp4
from dsv4_jax.tensor_files import StoredTensor

Kind = type[BlockFp8] | type[PackedFp4] | type[Nvfp4]

_FLOATS = ("BF16", "F16", "F32")
_INTEGERS = ("I64", "I32")
_KIND_OF_DTYPE: dict[str, Kind] = {"F8_E4M3": BlockFp8, "I8": PackedFp4, "U8": PackedFp4}
_SCALE_DTYPES: dict[Kind, tuple[str, ...]] = {BlockFp8: ("F8_E8M0", "F32"), PackedFp4: ("F8_E8M0",)}


class StoredArray(NamedTuple):
    """An array over mapped files: one part, or the parts stacked along an axis in front."""

    parts: tuple[NDArray[Any], ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = self.parts[0].shape
        return (len(self.parts), *shape) if self.stacked else shape

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return sum(part.nbytes for part in self.parts)

    def read(self, index: tuple[slice, ...] | None = None) -> NDArray[Any]:
        """What an index picks, one slice per axis; None: the whole.

        Always a copy: on the CPU, JAX keeps the memory that it is given, and a mapped file may change.
        """
        if index is None:
            index = (slice(None),) * len(self.shape)
        if not self.stacked:
            return np.array(self.parts[0][index])
        return np.stack([part[index[1:]] for part in self.parts[index[0]]])


class StoredWeight(NamedTuple):
    """A weight in its files.

    Attributes:
      kind: the class of a quantized one; None for plain numbers.
      arrays: the fields of that class; of plain numbers one, without a name.
    """

    kind: Kind | None
    arrays: Mapping[str, StoredArray]

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def tensors_of(place: Place, tensors: Mapping[str, StoredTensor]) -> list[tuple[StoredTensor, StoredTensor | None]]:
    """The tensors of a weight that are there, each with its scales if it has some."""
    present = [tensors[name] for name in place.names if name in tensors]
    return [(one, next((tensors[name] for name in scale_names(one.name) if name in tensors), None)) for one in present]


def stored_weight(
    place: Place, expected: jax.ShapeDtypeStruct, found: list[tuple[StoredTensor, StoredTensor | None]], experts: int
) -> StoredWeight:
    """A weight of the model in its tensors.

    Args:
      place: of the weight.
      expected: shape and dtype of its numbers.
      found: its tensors, in order, each with its scales or None.
      experts: of a layer; a table of experts has numbers below this.

    Raises:
      CheckpointError: a tensor does not fit. It is named.
    """
    kinds = {_kind(tensor) for tensor, _ in found}
    if len({tensor.dtype for tensor, _ in found}) > 1 or len({scale and scale.dtype for _, scale in found}) > 1:
        raise CheckpointError(f"{found[0][0]} and the other experts' tensors have different dtypes; one layer has one.")
    kind = kinds.pop()
    shape = expected.shape[1:] if place.stacked else expected.shape
    parts: list[dict[str, NDArray[Any]]] = []
    for tensor, scale in found:
        if expected.dtype == jnp.int32:
            parts.append({"": _table(tensor, shape, experts)})
        elif kind is None or not place.matrix:
            parts.append({"": _numbers(tensor, scale, shape, place.half)})
        else:
            parts.append(_codes(kind, tensor, scale, shape, place.half))
    arrays = {field: StoredArray(tuple(part[field] for part in parts), place.stacked) for field in parts[0]}
    return StoredWeight(None if "" in arrays else kind, arrays)


def _kind(tensor: StoredTensor) -> Kind | None:
    return _KIND_OF_DTYPE.get(tensor.dtype)


def _table(tensor: StoredTensor, shape: tuple[int, ...], experts: int) -> NDArray[np.int32]:
    """A table of experts."""
    _check_dtype(tensor, _INTEGERS)
    _check_shape(tensor, shape)
    table = tensor.array
    if table.size and not (table.min() >= 0 and table.max() < experts):
        raise CheckpointError(f"{tensor} names experts {table.min()} to {table.max()}; there are 0 to {experts - 1}.")
    return table.astype(np.int32)


def _numbers(
    tensor: StoredTensor, scale: StoredTensor | None, shape: tuple[int, ...], half: int | None
) -> NDArray[Any]:
    """A weight that is not quantized."""
    _check_dtype(tensor, _FLOATS)
    if scale is not None:
        raise CheckpointError(f"{tensor} has the scales {scale}, but its numbers are no codes.")
    _check_shape(tensor, _both_halves(shape, half))
    return _cut(tensor.array, half)


def _codes(
    kind: Kind, tensor: StoredTensor, scale: StoredTensor | None, shape: tuple[int, ...], half: int | None
) -> dict[str, NDArray[Any]]:
    """Codes and scales of a quantized weight, UE8M0 scales and packed codes as uint8."""
    if scale is None:
        raise CheckpointError(f"{tensor} has no scales: there is no {' or '.join(scale_names(tensor.name))}.")
    _check_dtype(scale, _SCALE_DTYPES[kind])
    *stack, rows, columns = _both_halves(shape, half)
    if kind is BlockFp8:
        if half is not None and shape[-2] % FP8_BLOCK:
            raise CheckpointError(f"{tensor}: a block of {FP8_BLOCK} rows reaches across halves of {shape[-2]} rows.")
        codes, scales = (rows, columns), (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    else:
        if columns % FP4_GROUP:
            raise CheckpointError(f"{tensor}: {columns} columns do not fall into groups of {FP4_GROUP}.")
        codes, scales = (rows, columns // 2), (rows, columns // FP4_GROUP)
    _check_shape(tensor, (*stack, *codes))
    _check_shape(scale, (*stack, *scales))
    arrays = {"codes": tensor, "scales": scale}
    return {field: _cut(_as_bytes(stored), half) for field, stored in arrays.items()}


def _as_bytes(tensor: StoredTensor) -> NDArray[Any]:
    return tensor.array.view(np.uint8) if tensor.dtype in ("I8", "F8_E8M0") else tensor.array


def _both_halves(shape: tuple[int, ...], half: int | None) -> tuple[int, ...]:
    return shape if half is None else (*shape[:-2], 2 * shape[-2], shape[-1])


def _cut(array: NDArray[Any], half: int | None) -> NDArray[Any]:
    """The rows that are this weight's."""
    if half is None:
        return array
    rows = array.shape[-2] // 2
    return array[..., half * rows : (half + 1) * rows, :]


def _check_dtype(tensor: StoredTensor, expected: tuple[str, ...]) -> None:
    if tensor.dtype not in expected:
        raise CheckpointError(f"{tensor} has the wrong dtype; expected {' or '.join(expected)}.")


def _check_shape(tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(f"{tensor} has the wrong shape; the model of config.json has {list(expected)}.")
