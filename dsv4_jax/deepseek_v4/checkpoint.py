"""``load_checkpoint``: a folder with config.json and safetensors, as ``ModelWeights`` on the device.

Everything is checked against the config before the first weight is read. Weights then go one at a time from the mapped
files to the device, with the sharding asked for: of a sharded weight, each device's part alone is read for it.
Quantized weights stay as they are. Beside the mapped files this takes host memory for one weight, which of experts is
a layer's stack (Flash: 1 GiB).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError, read_folder
from dsv4_jax.deepseek_v4.config import DeepseekV4Config, read_config
from dsv4_jax.deepseek_v4.names import is_ignored, place, recognise
from dsv4_jax.deepseek_v4.quantized import Nvfp4, quantize_nvfp4
from dsv4_jax.deepseek_v4.stored_weights import StoredArray, StoredWeight, stored_weight, tensors_of
from dsv4_jax.deepseek_v4.weights import ModelWeights, weight_shapes
from dsv4_jax.tensor_files import StoredTensor

ShardingOf = Callable[[str, tuple[int, ...]], Sharding | None]
Progress = Callable[[str, int, int], None]


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    sharding: Sharding | ShardingOf | None = None,
    nvfp4_compressors: bool = False,
    progress: Progress | None = None,
) -> tuple[DeepseekV4Config, ModelWeights]:
    """Loads a model.

    Args:
      folder: with config.json and one safetensors file, or several and their index; names as in DeepSeek's release, as
        Hugging Face's modules have them, or as ``save_pretrained`` writes them. MTP weights are ignored.
      sharding: where weights go: all alike, or by a function of an array's path and shape, such as
        ``("layers.3.ffn.experts.up.codes", (256, 2048, 2048))``; None is JAX's default device.
      nvfp4_compressors: quantize the compressors' kv and gate projections, the indexer's too, to NVFP4.
      progress: called after each weight with its path, the bytes read so far, and the bytes of the whole model.

    Returns:
      The config, and the weights as they are stored: bfloat16, float16, float32, ``BlockFp8`` (E4M3) or ``PackedFp4``
      (E2M1); tables of experts become int32.

    Raises:
      CheckpointError: a file is damaged, or a tensor is missing, unknown, or of a shape or dtype that does not fit.
      ConfigError: config.json is incomplete, or not a DeepSeek-V4 model's.
      FileNotFoundError: there is no config.json.
    """
    folder = Path(folder)
    config = read_config(folder)
    leaves, tree = jax.tree_util.tree_flatten_with_path(weight_shapes(config))
    shapes = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    tensors = {name: tensor for name, tensor in read_folder(folder).items() if not is_ignored(name)}
    stored = _match(folder, config, shapes, tensors)

    def put(path: str, array: StoredArray) -> jax.Array:
        chosen = sharding(path, array.shape) if callable(sharding) else sharding
        if chosen is None:
            return jax.device_put(array.read())
        return jax.make_array_from_callback(array.shape, chosen, array.read)

    def load(path: str, weight: StoredWeight) -> Any:
        if nvfp4_compressors and path.endswith((".compressor.kv", ".compressor.gate")):
            weight = _as_nvfp4(path, weight)
        if weight.kind is None:
            return put(path, weight.arrays[""])
        return weight.kind(**{field: put(f"{path}.{field}", array) for field, array in weight.arrays.items()})

    total, read, weights = sum(weight.nbytes for weight in stored.values()), 0, []
    for path, weight in stored.items():
        weights.append(jax.block_until_ready(load(path, weight)))
        read += weight.nbytes
        if progress:
            progress(path, read, total)
    return config, jax.tree.unflatten(tree, weights)


def _match(
    folder: Path,
    config: DeepseekV4Config,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, StoredTensor],
) -> dict[str, StoredWeight]:
    """Every weight of the model in its tensors, by path; what is missing, left over, or does not fit is an error."""
    # Whatever config.json says: with more experts than the folder has tensors, one of the first is missing already.
    experts = min(config.num_experts, len(tensors) + 1)
    scheme = recognise(tensors, expected, experts)
    if scheme is None:
        raise CheckpointError(f"{folder} has no tensor of a DeepSeek-V4 model; it has {_some(sorted(tensors))}.")
    places = {path: place(scheme, path, experts) for path in expected}
    found = {path: tensors_of(place, tensors) for path, place in places.items()}
    used = {tensor.name for pairs in found.values() for pair in pairs for tensor in pair if tensor}
    missing = [name for place in places.values() for name in place.names if name not in tensors]
    problems = []
    if missing:
        problems.append(f"lacks {_some(list(dict.fromkeys(missing)))}")
    if unknown := sorted(tensors.keys() - used):
        problems.append(f"has {_some(unknown)}, which are not of this model")
    if problems:
        raise CheckpointError(f"By its config.json, {folder} {' and '.join(problems)}.")
    return {path: stored_weight(places[path], expected[path], found[path], config.num_experts) for path in expected}


def _some(names: list[str]) -> str:
    """The first of these names, and how many there are."""
    shown = ", ".join(map(repr, names[:3])) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _as_nvfp4(path: str, weight: StoredWeight) -> StoredWeight:
    """A plain weight, quantized on the host."""
    if weight.kind is not None:
        raise CheckpointError(f"{path} is quantized already, as {weight.kind.__name__}; load it without NVFP4.")
    quantized = quantize_nvfp4(weight.arrays[""].read())
    return StoredWeight(Nvfp4, {field: StoredArray((np.asarray(array),)) for field, array in vars(quantized).items()})
