"""The tensors in a checkpoint's folder of safetensors files, not read yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_jax.tensor_files import StoredTensor, TensorFileError, parse_object, read_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is not the model its config.json says it is."""


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
    return _read_file(files[0])


def _read_index(index: Path) -> dict[str, StoredTensor]:
    content = _parse(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files.")
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file or not _is_file(index.parent / file):
            raise CheckpointError(f"{index} names the file {file!r}, which is not beside it.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_file(index.parent / file).items():
            if places.get(name) != file:
                raise CheckpointError(f"{tensor.file} holds {name!r}, which {index.name} does not place there.")
            tensors[name] = tensor
    for name, file in places.items():
        if name not in tensors:
            raise CheckpointError(f"{index} places {name!r} in {file}, which does not hold it.")
    return tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name longer than any file's
        return False


def _read_file(file: Path) -> dict[str, StoredTensor]:
    try:
        return read_file(file)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error


def _parse(index: Path) -> dict[str, Any]:
    try:
        return parse_object(index.read_bytes(), index)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error
