"""Loading: every name scheme gives the same weights, quantized ones stay so, and what does not fit is named."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    Tensors,
    decoded,
    file_of,
    read_tensors,
    with_module_names,
    with_release_names,
    with_saved_names,
    write_folder,
)
from cpu_devices import environment_of

from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError
from dsv4_jax.deepseek_v4.quantized import BlockFp8, Nvfp4, PackedFp4, quantize_block_fp8, quantize_nvfp4
from dsv4_jax.deepseek_v4.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from dsv4_jax.deepseek_v4.stored_weights import StoredArray

# One layer of each kind, the first one hashed, and matrices whose last blocks of 128 are not full.
CONFIG = dict(SMALL_CONFIG) | {
    "vocab_size": 40,
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "num_hash_layers": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "index_n_heads": 4,
    "n_routed_experts": 3,
    "moe_intermediate_size": 32,
    "hc_mult": 2,
}
BYTES = (np.int8, ml_dtypes.float8_e8m0fnu)  # which JAX gets as uint8
TINY = Path(__file__).parent / "data" / "tiny_deepseek_v4"


@pytest.fixture
def release(tmp_path, seed) -> Path:
    """A random checkpoint in the release's form."""
    write_random_checkpoint(tmp_path / "release", CONFIG, seed)
    return tmp_path / "release"


@pytest.fixture
def tensors(release) -> Tensors:
    return read_tensors(release)


def refused(tmp_path: Path, tensors: Tensors, message: str, config=CONFIG) -> None:
    folder = write_folder(tmp_path / "refused", config, tensors)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def assert_same(left, right) -> None:
    """The same pytree, dtypes and numbers."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype, path
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=jax.tree_util.keystr(path))


def test_the_release_form(release, tensors):
    """Every tensor is where it belongs, as it was stored."""
    config, weights = load_checkpoint(release)
    assert config.num_experts == 3
    kinds = {np.dtype(np.int8): PackedFp4, np.dtype(ml_dtypes.float8_e4m3fn): BlockFp8}
    used = set()

    def same(weight, *names: str) -> None:
        used.update(names)
        if tensors[names[0]].dtype not in kinds:
            weight, fields = {"": weight}, {"": names}
        else:
            assert type(weight) is kinds[tensors[names[0]].dtype]
            assert weight.shape[-2:] == decoded(tensors)[names[0]].shape
            weight = vars(weight)
            fields = {"codes": names, "scales": [name.removesuffix("weight") + "scale" for name in names]}
        for field, stored in fields.items():
            expected = np.stack([tensors[name] for name in stored]) if len(stored) > 1 else tensors[stored[0]]
            found = np.asarray(weight[field])
            if expected.dtype == np.int64:
                assert found.dtype == np.int32
            else:
                assert found.dtype == (np.uint8 if expected.dtype in BYTES else expected.dtype)
                expected = expected.view(found.dtype)
            np.testing.assert_array_equal(found, expected, err_msg=stored[0])

    def compressor(weight, name: str) -> None:
        same(weight.kv, f"{name}.wkv.weight")
        same(weight.gate, f"{name}.wgate.weight")
        same(weight.position_bias, f"{name}.ape")
        same(weight.norm, f"{name}.norm.weight")

    def hyper_connection(weight, name: str) -> None:
        for field in ("fn", "base", "scale"):
            same(getattr(weight, field), f"{name}_{field}")

    same(weights.embed, "embed.weight")
    same(weights.norm, "norm.weight")
    same(weights.head, "head.weight")
    hyper_connection(weights.hc_head, "hc_head")
    for index, layer in enumerate(weights.layers):
        name, attention = f"layers.{index}", layer.attention
        hyper_connection(layer.hc_attn, f"{name}.hc_attn")
        hyper_connection(layer.hc_ffn, f"{name}.hc_ffn")
        same(layer.attn_norm, f"{name}.attn_norm.weight")
        same(layer.ffn_norm, f"{name}.ffn_norm.weight")
        for field in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b"):
            same(getattr(attention, field), f"{name}.attn.{field}.weight")
        same(attention.sinks, f"{name}.attn.attn_sink")
        assert (attention.compressor is None) == (index == 0)
        assert (attention.indexer is None) == (index != 1)
        if attention.compressor:
            compressor(attention.compressor, f"{name}.attn.compressor")
        if attention.indexer:
            compressor(attention.indexer.compressor, f"{name}.attn.indexer.compressor")
            same(attention.indexer.query, f"{name}.attn.indexer.wq_b.weight")
            same(attention.indexer.head_weights, f"{name}.attn.indexer.weights_proj.weight")
        same(layer.ffn.gate, f"{name}.ffn.gate.weight")
        assert (layer.ffn.bias is None, layer.ffn.token_experts is None) == (index == 0, index != 0)
        if layer.ffn.bias is None:
            same(layer.ffn.token_experts, f"{name}.ffn.gate.tid2eid")
        else:
            same(layer.ffn.bias, f"{name}.ffn.gate.bias")
        for field, which in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            same(getattr(layer.ffn.experts, field), *(f"{name}.ffn.experts.{e}.{which}.weight" for e in range(3)))
            same(getattr(layer.ffn.shared, field), f"{name}.ffn.shared_experts.{which}.weight")
    assert used == {name for name in tensors if not name.endswith(".scale")}


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
@pytest.mark.parametrize("renamed", [with_module_names, with_saved_names])
def test_every_name_scheme_gives_the_same_weights(renamed, quantized, tmp_path, tensors):
    stored = tensors if quantized else decoded(tensors)
    _, expected = load_checkpoint(write_folder(tmp_path / "release-names", CONFIG, stored))
    _, found = load_checkpoint(write_folder(tmp_path / "renamed", CONFIG, renamed(stored)))
    assert isinstance(found.layers[1].ffn.experts.up, PackedFp4) == quantized
    assert_same(found, expected)


def test_hugging_faces_own_file_in_every_name_scheme(tmp_path, seed):
    """What Hugging Face's modules are called is read from a file that it wrote."""
    config, modules = json.loads((TINY / "config.json").read_text()), read_tensors(TINY)
    write_random_checkpoint(tmp_path / "random", config, seed)
    names = decoded(read_tensors(tmp_path / "random"))
    release = with_release_names(modules, names)
    assert with_module_names(release).keys() == modules.keys()
    _, expected = load_checkpoint(TINY)
    for name, tensors in (("release", release), ("saved", with_saved_names(release))):
        _, found = load_checkpoint(write_folder(tmp_path / name, config, tensors))
        assert_same(found, expected)


def test_experts_in_fp8_with_fp32_scales(tmp_path, tensors, rng):
    """As in the base model."""
    name = "layers.1.ffn.experts.{}.{}.{}"
    for expert in range(3):
        for which, shape in (("w1", (32, 160)), ("w3", (32, 160)), ("w2", (160, 32))):
            quantized = quantize_block_fp8(rng.standard_normal(shape), scale_dtype=np.float32)
            tensors[name.format(expert, which, "weight")] = np.asarray(quantized.codes)
            tensors[name.format(expert, which, "scale")] = np.asarray(quantized.scales)
    _, weights = load_checkpoint(write_folder(tmp_path / "base", CONFIG, tensors))
    for which, weight in (("w1", weights.layers[1].ffn.experts.gate), ("w2", weights.layers[1].ffn.experts.down)):
        assert isinstance(weight, BlockFp8)
        assert weight.scales.dtype == jnp.float32
        expected = np.stack([decoded(tensors)[name.format(expert, which, "weight")] for expert in range(3)])
        np.testing.assert_array_equal(weight.expand(jnp.float32), expected)
    # Under Hugging Face's names gate and up are one tensor, and 32 rows are no whole block.
    names = r"layers.1.mlp.experts.gate_up_proj \(F8_E4M3 .*: a block of 128 rows reaches across halves of 32 rows"
    refused(tmp_path, with_module_names(tensors), names)


def test_several_files_with_an_index(tmp_path, release, tensors, rng):
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = list(rng.permutation(sorted(tensors)))
    shards = {f"model-{index}.safetensors": names[index::3] for index in range(3)}
    for file, part in shards.items():
        (folder / file).write_bytes(file_of({name: tensors[name] for name in part}))
    places = {name: file for file, part in shards.items() for name in part}
    index = folder / "model.safetensors.index.json"

    def says(**changed: str | None) -> None:
        changed_places = {name: file for name, file in (places | changed).items() if file is not None}
        index.write_text(json.dumps({"metadata": {}, "weight_map": changed_places}))

    def is_refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)

    is_refused(r"model-0.safetensors, model-1.safetensors, model-2.safetensors; it needs one, or several and their")
    says()
    assert_same(load_checkpoint(folder)[1], load_checkpoint(release)[1])
    says(**{"embed.weight": "model-7.safetensors"})
    is_refused(r"'model-7.safetensors', which is not beside it")
    says(**{"embed.weight": "../release/model.safetensors"})
    is_refused(r"'../release/model.safetensors', which is not beside it")
    says(**{"new.weight": "model-0.safetensors"})
    is_refused(r"places 'new.weight' in model-0.safetensors, which does not hold it")
    says(**{"embed.weight": None})
    is_refused(r"holds 'embed.weight', which model.safetensors.index.json does not place there")
    index.write_text("{}")
    is_refused(r"has no weight_map")
    index.write_text('{"weight_map":')
    is_refused(r"its JSON cannot be read")
    says()
    (folder / "other.safetensors.index.json").write_text("{}")
    is_refused(r"2 indices")


def test_mtp_weights_are_ignored(tmp_path, release, tensors):
    tensors |= {"mtp.0.norm.weight": np.ones(3, np.float32), "model.mtp.0.norm.weight": np.ones(3, np.float32)}
    _, weights = load_checkpoint(write_folder(tmp_path / "mtp", CONFIG, tensors))
    assert_same(weights, load_checkpoint(release)[1])


MISFITS = {
    "missing": (lambda t: t.pop("layers.1.attn.wkv.weight"), r"lacks 'layers.1.attn.wkv.weight'"),
    "an expert is missing": (lambda t: t.pop("layers.2.ffn.experts.1.w3.weight"), r"layers.2.ffn.experts.1.w3.weight"),
    "unknown": (lambda t: t.update({"layers.3.attn_norm.weight": np.ones(160, np.float32)}), r"layers.3.attn_norm"),
    "shape": (
        lambda t: t.update({"layers.2.attn.compressor.ape": np.ones((4, 512), np.float32)}),
        r"layers.2.attn.compressor.ape \(F32 \[4, 512\] in model.safetensors\) has the wrong shape; .* \[128, 512\]",
    ),
    "an expert's shape": (
        lambda t: t.update({"layers.0.ffn.experts.2.w2.weight": np.ones((160, 17), np.int8)}),
        r"layers.0.ffn.experts.2.w2.weight .* has the wrong shape; .* \[160, 16\]",
    ),
    "dtype": (
        lambda t: t.update({"norm.weight": np.ones(160, np.float64)}),
        r"norm.weight \(F64 .* has the wrong dtype; expected BF16 or F16 or F32",
    ),
    "a norm in FP8": (
        lambda t: t.update({"norm.weight": np.ones(160, ml_dtypes.float8_e4m3fn)}),
        r"norm.weight \(F8_E4M3 .* has the wrong dtype",
    ),
    "codes without scales": (
        lambda t: t.pop("layers.1.attn.wq_b.scale"),
        r"layers.1.attn.wq_b.weight .* has no scales: there is no layers.1.attn.wq_b.scale or layers.1.attn.wq_b.we",
    ),
    "scales of the wrong shape": (
        lambda t: t.update({"layers.1.attn.wq_b.scale": np.ones((8, 2), ml_dtypes.float8_e8m0fnu)}),
        r"layers.1.attn.wq_b.scale .* has the wrong shape; .* \[8, 1\]",
    ),
    "scales of the wrong dtype": (
        lambda t: t.update({"layers.1.attn.wq_b.scale": np.ones((8, 1), ml_dtypes.bfloat16)}),
        r"layers.1.attn.wq_b.scale \(BF16 .* has the wrong dtype; expected F8_E8M0 or F32",
    ),
    "scales of plain numbers": (
        lambda t: t.update({"layers.1.ffn.gate.scale": np.ones((1, 2), np.float32)}),
        r"layers.1.ffn.gate.weight \(BF16 .* has the scales layers.1.ffn.gate.scale",
    ),
    "experts of different dtypes": (
        lambda t: t.update({"layers.1.ffn.experts.1.w1.weight": np.ones((32, 160), np.float32)}),
        r"layers.1.ffn.experts.0.w1.weight .* different dtypes",
    ),
    "an expert that there is not": (
        lambda t: t.update({"layers.0.ffn.gate.tid2eid": np.full((40, 2), 3)}),
        r"layers.0.ffn.gate.tid2eid .* names experts 3 to 3; there are 0 to 2",
    ),
    "a foreign model": (
        lambda t: (t.clear(), t.update({"model.decoder.weight": np.ones(3, np.float32)})),
        r"no tensor of a DeepSeek-V4 model; it has 'model.decoder.weight'",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_by_name(misfit, tmp_path, tensors):
    change, message = MISFITS[misfit]
    change(tensors)
    refused(tmp_path, tensors, message)


def test_a_fused_tensor_is_checked_whole(tmp_path, tensors):
    modules = with_module_names(decoded(tensors))
    modules["model.layers.1.mlp.experts.gate_up_proj"] = np.ones((3, 63, 160), np.float32)
    refused(tmp_path, modules, r"model.layers.1.mlp.experts.gate_up_proj .* has the wrong shape; .* \[3, 64, 160\]")


def test_folders_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_checkpoint(tmp_path)


def test_where_weights_go(release):
    """A sharding for all, and one for each array."""
    mesh = jax.make_mesh((1,), ("experts",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_expert = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("experts"))
    _, expected = load_checkpoint(release)
    _, alike = load_checkpoint(release, sharding=everywhere)
    assert {leaf.sharding for leaf in jax.tree.leaves(alike)} == {everywhere}
    asked = {}

    def sharding(path, shape):
        asked[path] = shape
        return by_expert if ".experts." in path else None

    _, chosen = load_checkpoint(release, sharding=sharding)
    assert chosen.layers[1].ffn.experts.up.scales.sharding == by_expert
    assert asked["layers.1.ffn.experts.up.codes"] == (3, 32, 80)
    assert len(asked) == len(jax.tree.leaves(chosen))
    assert_same(alike, expected)
    assert_same(chosen, expected)


ON_THREE_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.stored_weights import StoredArray

mesh, read, reads = jax.make_mesh((3,), ("experts",)), StoredArray.read, []

def sharding(path, shape):
    return NamedSharding(mesh, PartitionSpec("experts") if ".experts." in path else PartitionSpec())

_, whole = load_checkpoint(sys.argv[1])
StoredArray.read = lambda array, index=None: reads.append(read(array, index)) or reads[-1]
_, sharded = load_checkpoint(sys.argv[1], sharding=sharding)
for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert len(one.addressable_shards) == 3
codes = sharded.layers[1].ffn.experts.up.codes
assert [shard.data.shape for shard in codes.addressable_shards] == [(1, 32, 80)] * 3
# The experts' codes and scales alone have three axes. Each was read expert by expert.
assert {array.shape[0] for array in reads if array.ndim == 3} == {1}
"""


def test_each_device_gets_its_experts_and_no_others(release):
    program = [sys.executable, "-c", ON_THREE_DEVICES, str(release)]
    done = subprocess.run(program, env=environment_of(3), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_part_of_a_stored_array_is_that_of_the_whole(rng):
    parts = rng.standard_normal((4, 6, 8))
    for array in (StoredArray((parts,)), StoredArray(tuple(parts), stacked=True)):
        assert array.shape == (4, 6, 8)
        assert array.nbytes == parts.nbytes
        np.testing.assert_array_equal(array.read(), parts)
        for _ in range(20):
            index = tuple(slice(*np.sort(rng.choice(size + 1, 2, replace=False)).tolist()) for size in array.shape)
            np.testing.assert_array_equal(array.read(index), parts[index])


def test_progress_counts_every_byte(release, tensors):
    calls = []
    load_checkpoint(release, progress=lambda *call: calls.append(call))
    paths, done, totals = zip(*calls, strict=True)
    assert set(totals) == {done[-1]}
    assert list(done) == sorted(done)
    table = tensors["layers.0.ffn.gate.tid2eid"]
    assert done[-1] == sum(array.nbytes for array in tensors.values()) - table.nbytes // 2  # int32 on the device
    assert "layers.1.attention.indexer.query" in paths


def test_compressors_as_nvfp4(release, tmp_path, tensors):
    _, plain = load_checkpoint(release)
    _, found = load_checkpoint(release, nvfp4_compressors=True)
    for layer, expected in zip(found.layers[1:], plain.layers[1:], strict=True):
        pairs = [(layer.attention.compressor, expected.attention.compressor)]
        if layer.attention.indexer:
            pairs.append((layer.attention.indexer.compressor, expected.attention.indexer.compressor))
        for one, other in pairs:
            for field in ("kv", "gate"):
                assert isinstance(getattr(one, field), Nvfp4)
                assert_same(getattr(one, field), quantize_nvfp4(np.asarray(getattr(other, field))))
    numbers = tensors["layers.1.attn.compressor.wkv.weight"]
    quantized = quantize_block_fp8(numbers)
    tensors["layers.1.attn.compressor.wkv.weight"] = np.asarray(quantized.codes)
    tensors["layers.1.attn.compressor.wkv.scale"] = np.asarray(quantized.scales).view(ml_dtypes.float8_e8m0fnu)
    folder = write_folder(tmp_path / "fp8", CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"layers.1.attention.compressor.kv is quantized already, as BlockFp8"):
        load_checkpoint(folder, nvfp4_compressors=True)


def test_files_are_mapped_and_not_read(tmp_path, release, tensors):
    """A file larger than any memory, nearly all of it a hole: MTP weights that nobody asks for."""
    tensors = {name: array for name, array in tensors.items() if array.nbytes}
    content = file_of(tensors)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    end, size = len(content) - 8 - length, 2**38
    header["mtp.0.embed.weight"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    text = json.dumps(header).encode()
    folder = write_folder(tmp_path / "large", CONFIG, {})
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    os.truncate(file, file.stat().st_size + size)
    _, weights = load_checkpoint(folder)
    assert_same(weights, load_checkpoint(release)[1])


def test_weights_do_not_change_with_their_file(release):
    file = release / "model.safetensors"
    _, expected = load_checkpoint(release)
    expected = jax.tree.map(np.array, expected)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = [load_checkpoint(release, sharding=sharding)[1] for sharding in (None, device)]
    with file.open("r+b") as out:
        out.write(b"\x55" * file.stat().st_size)
    for weights in loaded:
        assert_same(weights, expected)
