"""safetensors files: their tensors, memory-mapped, and what makes such a file of tensors.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name, dtype, shape, place) and the bytes
of the tensors, end to end. The format's own Python package gives NumPy no E4M3 and no UE8M0, which are most of a
DeepSeek-V4 checkpoint. Nothing is read before it is used: a tensor is an array over the mapped file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dsv4_jax.errors import Picklable
from dsv4_jax.json_text import parse_json

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # bytes, as the format has it
_MOST_AXES = 32  # of an array, which every NumPy can make


class TensorFileError(Picklable, ValueError):
    """A safetensors file that is damaged."""


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint, not read yet.

    Attributes:
      name: in the file.
      file: where it is.
      dtype: as the format spells it, such as ``"F8_E4M3"``.
      array: over the mapped file, read-only, [*shape] of that dtype.
    """

    name: str
    file: Path
    dtype: str
    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored; packed codes count bytes."""
        return self.array.shape

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)} in {self.file.name})"


def read_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name.

    Raises:
      TensorFileError: the file is damaged. Its tensors have to fill it, end to end.
    """
    content = np.memmap(file, np.uint8, mode="r") if file.stat().st_size else np.zeros(0, np.uint8)
    return decode(content, file)[0]


def decode(content: NDArray[np.uint8], file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file's bytes, by name, and its metadata.

    Args:
      content: uint8 [bytes]; the tensors are views of it.
      file: what errors call it.

    Raises:
      TensorFileError: the bytes are no safetensors file, or a damaged one.
    """
    size = content.size
    if size < 8:
        raise TensorFileError(f"{file} is no safetensors file: it has {size} bytes, and its header's length takes 8.")
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise TensorFileError(
            f"{file} is no safetensors file, or cut off: its header would have {length} bytes, the file has {size}."
        )
    header = parse_object(content[8 : 8 + length].tobytes(), file)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"{file}: the header's {_METADATA} is {metadata!r}, expected an object of strings.")
    data = np.asarray(content[8 + length :])
    places = {name: _place(file, name, entry) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise TensorFileError(
                f"{file}: {name!r} begins at byte {place.begin} of the data, where byte {end} is next; tensors lie end "
                "to end."
            )
        end = place.end
    if end != len(data):
        raise TensorFileError(f"{file}: its tensors take {end} bytes, and it has {len(data)}; it may be cut off.")
    tensors = {
        name: StoredTensor(name, file, dtype, data[begin:end].view(_DTYPES[dtype]).reshape(shape))
        for name, (dtype, shape, begin, end) in places.items()
    }
    return tensors, metadata


class _Place(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _place(file: Path, name: str, entry: Any) -> _Place:
    """What a header says about a tensor, checked but for its place among the others."""
    if not isinstance(entry, dict):
        raise TensorFileError(f"{file}: the header's {name!r} is {entry!r}, expected dtype, shape and data_offsets.")
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise TensorFileError(f"{file}: {name!r} has dtype {dtype!r}; known are {', '.join(_DTYPES)}.")
    if shape is None:
        raise TensorFileError(f"{file}: {name!r} has shape {entry.get('shape')!r}, expected a list of sizes.")
    if len(shape) > _MOST_AXES:
        raise TensorFileError(f"{file}: {name!r} has a shape of {len(shape)} axes, expected at most {_MOST_AXES}.")
    if math.prod(size or 1 for size in shape) * _DTYPES[dtype].itemsize >= 2**63:  # NumPy refuses it, 0 bytes or not
        raise TensorFileError(f"{file}: {name!r} has shape {list(shape)}, more than any array has.")
    if offsets is None or len(offsets) != 2:
        raise TensorFileError(
            f"{file}: {name!r} has data_offsets {entry.get('data_offsets')!r}, expected where it begins and ends."
        )
    begin, end = offsets
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != expected:
        raise TensorFileError(
            f"{file}: {name!r} lies from byte {begin} to {end}, but {dtype} {list(shape)} takes {expected} bytes."
        )
    return _Place(dtype, shape, begin, end)


def _counts(value: Any) -> tuple[int, ...] | None:
    """A list of sizes or places; None if it is something else."""
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**63 for number in value):
        return None
    return tuple(value)


def parse_object(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object in which no name occurs twice. Raises TensorFileError."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise TensorFileError(f"{file}: its JSON cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise TensorFileError(f"{file}: its JSON is a {type(content).__name__}, expected an object.")
    return content


def write_file(file: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes tensors as one safetensors file. Raises KeyError for a dtype that the format does not have."""
    parts = encode(tensors)
    with file.open("wb") as out:
        for part in parts:
            out.write(part)


def encode(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """The bytes of a safetensors file, in parts that follow each other; the tensors' own are not copied.

    Raises KeyError for a dtype that the format does not have.
    """
    # Wide numbers first: each tensor then lies at a multiple of its own size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for _, array in ordered]
    return [len(text).to_bytes(8, "little") + text, *data]
