"""The tensors in a folder of safetensors files, memory-mapped, and a writer of one such file.

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

_LONGEST_HEADER = 100_000_000  # bytes, as the format has it


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is not the model its config.json says it is."""


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


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint: one safetensors file, or several with an index (``*.safetensors.index.json``).

    Raises:
      CheckpointError: there is neither, a file is damaged, or index and files disagree.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} has {len(indices)} indices ({', '.join(path.name for path in indices)}); keep one."
        )
    if indices:
        return _read_index(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "no safetensors file"
        raise CheckpointError(f"{folder} has {found}; it needs one, or several and their model.safetensors.index.json.")
    return read_file(files[0])


def _read_index(index: Path) -> dict[str, StoredTensor]:
    content = _parse(index.read_bytes(), index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files.")
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file or not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names the file {file!r}, which is not beside it.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_file(index.parent / file).items():
            if places.get(name) != file:
                raise CheckpointError(f"{tensor.file} holds {name!r}, which {index.name} does not place there.")
            tensors[name] = tensor
    for name, file in places.items():
        if name not in tensors:
            raise CheckpointError(f"{index} places {name!r} in {file}, which does not hold it.")
    return tensors


def read_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name.

    Raises:
      CheckpointError: the file is damaged. Its tensors have to fill it, end to end.
    """
    size = file.stat().st_size
    if size < 8:
        raise CheckpointError(f"{file} is no safetensors file: it has {size} bytes, and its header's length takes 8.")
    content = np.memmap(file, np.uint8, mode="r")
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise CheckpointError(
            f"{file} is no safetensors file, or cut off: its header would have {length} bytes, the file has {size}."
        )
    header = _parse(content[8 : 8 + length].tobytes(), file)
    header.pop("__metadata__", None)
    data = np.asarray(content[8 + length :])
    places = {name: _place(file, name, entry) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise CheckpointError(
                f"{file}: {name!r} begins at byte {place.begin} of the data, where byte {end} is next; tensors lie end "
                "to end."
            )
        end = place.end
    if end != len(data):
        raise CheckpointError(f"{file}: its tensors take {end} bytes, and it has {len(data)}; it may be cut off.")
    return {
        name: StoredTensor(name, file, dtype, data[begin:end].view(_DTYPES[dtype]).reshape(shape))
        for name, (dtype, shape, begin, end) in places.items()
    }


class _Place(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _place(file: Path, name: str, entry: Any) -> _Place:
    """What a header says about a tensor, checked but for its place among the others."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{file}: the header's {name!r} is {entry!r}, expected dtype, shape and data_offsets.")
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {name!r} has dtype {dtype!r}; known are {', '.join(_DTYPES)}.")
    if shape is None:
        raise CheckpointError(f"{file}: {name!r} has shape {entry.get('shape')!r}, expected a list of sizes.")
    if offsets is None or len(offsets) != 2:
        raise CheckpointError(
            f"{file}: {name!r} has data_offsets {entry.get('data_offsets')!r}, expected where it begins and ends."
        )
    begin, end = offsets
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{file}: {name!r} lies from byte {begin} to {end}, but {dtype} {list(shape)} takes {expected} bytes."
        )
    return _Place(dtype, shape, begin, end)


def _counts(value: Any) -> tuple[int, ...] | None:
    """A list of sizes or places; None if it is something else."""
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**63 for number in value):
        return None
    return tuple(value)


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object in which no name occurs twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its JSON cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: its JSON is a {type(content).__name__}, expected an object.")
    return content


def write_file(file: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes tensors as one safetensors file. Raises KeyError for a dtype that the format does not have."""
    # Wide numbers first: each tensor then lies at a multiple of its own size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, end = {}, 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            out.write(np.ascontiguousarray(array).tobytes())
