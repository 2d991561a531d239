"""A request's state as the bytes of a safetensors file, and back.

Tensors: ``tokens``, ``slot.NAME`` and ``blocks.NAME``, a request's blocks in order. The metadata's ``dsv4_jax.request``
is JSON: what else the manager knows, and a SHA-256 of every tensor, of its dtype, shape and bytes;
``dsv4_jax.request.sha256`` is that of the JSON. The header is as ``tensor_files.encode`` writes it, to the byte. So no
byte of a file can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_jax import tensor_files
from dsv4_jax.host.parking import RequestRecord
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.parking.arrays import CHUNK_BLOCKS, Rows, padded_size, slot_arrays
from dsv4_jax.spec.kinds import BLOCK_TOKENS
from dsv4_jax.tensor_files import TensorFileError

_KEY, _DIGEST = "dsv4_jax.request", "dsv4_jax.request.sha256"
_VERSION = 2  # 1 had checksums of the bytes alone
_NUMBERS = ("length", "blocks", "peak", "floor", "stored")


def encode(record: RequestRecord, slot: Rows, blocks: Sequence[Rows]) -> list[Any]:
    """The bytes of the file, in parts that follow each other."""
    tensors: dict[str, NDArray[Any]] = {"tokens": record.tokens.astype("<i4")}
    tensors |= {f"slot.{name}": np.asarray(array) for name, array in slot.items()}
    for name in blocks[0] if blocks else ():
        left = [record.blocks - first for first in range(0, record.blocks, CHUNK_BLOCKS)]
        chunks = (np.asarray(chunk[name])[:, :count] for chunk, count in zip(blocks, left, strict=True))
        tensors[f"blocks.{name}"] = np.concatenate([*chunks], axis=1)
    content = {
        "version": _VERSION,
        "made_for": record.made_for,
        "salt": None if record.salt is None else record.salt.hex(),
        "worth": list(record.worth),
        **{name: getattr(record, name) for name in _NUMBERS},
        "sha256": {name: _digest(array) for name, array in tensors.items()},
    }
    text = json.dumps(content, sort_keys=True)
    return tensor_files.encode(tensors, {_KEY: text, _DIGEST: hashlib.sha256(text.encode()).hexdigest()})


def decode(data: bytes, path: Path) -> tuple[RequestRecord, Rows, tuple[Rows, ...]]:
    """What the bytes of a file, which errors call ``path``, hold; views of these but for tokens and the last chunk.

    Raises:
      TensorFileError: they are something else, or damaged.
    """
    tensors, metadata = tensor_files.decode(np.frombuffer(data, np.uint8), path)
    if _KEY not in metadata:
        raise TensorFileError(f"{path} holds no request's state: its metadata has no {_KEY}.")
    text = metadata[_KEY]
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get(_DIGEST):
        raise TensorFileError(f"{path} is damaged: the checksum of its {_KEY} is another.")
    content = tensor_files.parse_object(text.encode(), path)
    if content.get("version") != _VERSION:
        raise TensorFileError(f"{path} has version {content.get('version')!r}, this package reads {_VERSION}.")
    arrays = {name: tensor.array for name, tensor in tensors.items()}
    _check_digests(content.get("sha256"), arrays, path)
    header = tensor_files.encode(arrays, {_KEY: text, _DIGEST: metadata[_DIGEST]})[0]
    if data[: len(header)] != header:
        raise TensorFileError(f"{path} is damaged, or something else wrote it: its header is not as it was saved.")
    record = _record(content, arrays.pop("tokens", None), path)
    slot = {name.removeprefix("slot."): array for name, array in arrays.items() if name.startswith("slot.")}
    pages = {name.removeprefix("blocks."): array for name, array in arrays.items() if name.startswith("blocks.")}
    whole = len(slot) + len(pages) == len(arrays) and all(
        array.ndim > 1 and array.shape[1] == record.blocks for array in pages.values()
    )
    # What follows takes time for every block: a file may not claim blocks of which it has no bytes.
    if not whole or (record.blocks and not any(array.size for array in pages.values())):
        raise TensorFileError(f"{path} has other tensors than a request of {record.blocks} blocks.")
    return record, slot, _chunked(pages, record.blocks)


def _check_digests(digests: Any, arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    if not isinstance(digests, dict) or digests.keys() != arrays.keys():
        raise TensorFileError(f"{path} has other tensors than it has checksums of.")
    for name, array in arrays.items():
        if digests[name] != _digest(array):
            raise TensorFileError(f"{path} is damaged: the checksum of {name!r} is another.")


def _record(content: Mapping[str, Any], tokens: NDArray[Any] | None, path: Path) -> RequestRecord:
    wrong = TensorFileError(f"{path} has a {_KEY} that says no request: {dict(content) | {'sha256': '…'}}.")
    numbers: list[Any] = [content.get(name) for name in _NUMBERS]
    worth: Any = content.get("worth")
    salt, made_for = content.get("salt"), content.get("made_for")
    whole = isinstance(worth, list) and all(type(one) is int and 0 <= one < 2**31 for one in [*numbers, *worth])
    if not whole or not isinstance(made_for, str) or tokens is None or tokens.dtype != np.int32 or tokens.ndim != 1:
        raise wrong
    tensor_files.parse_object(made_for.encode(), path)
    try:
        known = None if salt is None else bytes.fromhex(salt)
    except (TypeError, ValueError) as error:
        raise wrong from error
    length, blocks, peak, floor, stored = numbers
    if not (floor <= length <= peak and stored <= min(length, tokens.size)):
        raise wrong
    return RequestRecord(made_for, length, blocks, peak, floor, stored, tokens.copy(), known, tuple(worth))


def _chunked(pages: Rows, blocks: int) -> tuple[Rows, ...]:
    chunks = []
    for first in range(0, blocks, CHUNK_BLOCKS):
        count = min(CHUNK_BLOCKS, blocks - first)
        part = {name: array[:, first : first + count] for name, array in pages.items()}
        if more := padded_size(count) - count:  # of the last one alone
            padding = {
                name: np.zeros((len(array), more, *array.shape[2:]), array.dtype) for name, array in part.items()
            }
            part = {name: np.concatenate([array, padding[name]], axis=1) for name, array in part.items()}
        chunks.append(part)
    return tuple(chunks)


def misfit(schema: CacheSchema, record: RequestRecord, slot: Rows, blocks: Sequence[Rows]) -> str | None:
    """Why these arrays are not those of a request of a cache of this schema; None if they are."""
    expected = {name: schema.arrays[name] for name in slot_arrays(schema, 0)}
    between = record.length % BLOCK_TOKENS == 0  # where nothing of an HCA tail is in use, and a prefix has none
    optional = {f"{kind.value}_tail" for kind in schema.kinds if kind.ratio == BLOCK_TOKENS and between}
    if not expected.keys() - optional <= slot.keys() <= expected.keys():
        return f"the state has the arrays {', '.join(slot)}, expected {', '.join(expected)}."
    for name, array in slot.items():
        shape = expected[name].shape[:1] + expected[name].shape[2:]
        if (array.shape, array.dtype) != (shape, expected[name].dtype):
            return f"the state's {name} is {array.dtype} {list(array.shape)}, expected {expected[name].dtype} {shape}."
    sizes = [padded_size(min(CHUNK_BLOCKS, record.blocks - at)) for at in range(0, record.blocks, CHUNK_BLOCKS)]
    if len(sizes) != len(blocks):
        return f"the state has {len(blocks)} chunks of blocks, a request of {record.blocks} has {len(sizes)}."
    for size, chunk in zip(sizes, blocks, strict=True):
        if chunk.keys() != set(schema.block_pools):
            return f"the state has blocks of {', '.join(chunk)}, expected {', '.join(schema.block_pools)}."
        for name, array in chunk.items():
            like = schema.arrays[name]
            shape = (like.shape[0], size, *like.shape[2:])
            if (array.shape, array.dtype) != (shape, like.dtype):
                return f"the state's blocks of {name} are {array.dtype} {list(array.shape)}, expected {list(shape)}."
    return None


def write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Writes a file that is there as a whole or not at all: to another name, to the disk, and then to its own name."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(array: NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{array.dtype.name} {list(array.shape)} ".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
