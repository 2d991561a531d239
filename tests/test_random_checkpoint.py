"""The random checkpoint: in the cache folder and nowhere else, whole or not at all, and like a release."""

import json
import os

import numpy as np
import pytest
from checkpoints import read_tensors

from dsv4_jax.deepseek_v4 import random_checkpoint as module
from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.random_checkpoint import random_checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "cache" / "dsv4-jax"


def test_it_is_written_once_into_the_cache_folder(cache, tmp_path):
    folder = random_checkpoint()
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.name for path in written} == {"config.json", "model.safetensors"}
    assert folder.parent == cache
    assert random_checkpoint() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert os.listdir(cache) == [folder.name]
    assert os.listdir(tmp_path) == ["cache"]


def test_without_a_cache_folder_of_its_own(tmp_path, monkeypatch):
    """The variable counts where it is an absolute path."""
    expected = tmp_path / "home" / ".cache" / "dsv4-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert random_checkpoint(1).parent == expected
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert random_checkpoint(2).parent == expected


def test_the_seed_decides(seed):
    one, other = read_tensors(random_checkpoint(seed)), read_tensors(random_checkpoint(seed + 1))
    module.write_random_checkpoint(random_checkpoint(seed).parent / "again", module.SMALL_CONFIG, seed)
    again = read_tensors(random_checkpoint(seed).parent / "again")
    assert one.keys() == other.keys() == again.keys()
    for name, array in one.items():
        assert array.tobytes() == again[name].tobytes()
        if not name.endswith(".scale"):
            assert array.tobytes() != other[name].tobytes(), name


def test_nothing_is_left_of_what_failed(cache, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(module, "write_file", fail)
    with pytest.raises(OSError, match="disk is full"):
        random_checkpoint()
    assert os.listdir(cache) == []


def test_another_process_may_be_faster(cache, monkeypatch):
    write = module.write_random_checkpoint

    def write_two(folder, config, seed):
        write(cache / "random-checkpoint-1-seed-0", config, seed)
        write(folder, config, seed)

    monkeypatch.setattr(module, "write_random_checkpoint", write_two)
    folder = random_checkpoint()
    assert os.listdir(cache) == [folder.name]
    load_checkpoint(folder)


def test_it_is_stored_as_a_release_is():
    """Every dtype; the geometry of the cache; every kind of layer and of routing."""
    folder = random_checkpoint()
    tensors, config = read_tensors(folder), json.loads((folder / "config.json").read_text())
    dtypes = {name: array.dtype.name for name, array in tensors.items()}
    layer = "layers.1."
    for name in ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b"):
        assert dtypes[f"{layer}{name}.weight"] == "float8_e4m3fn"
        assert dtypes[f"{layer}{name}.scale"] == "float8_e8m0fnu"
    for which in ("w1", "w2", "w3"):
        assert dtypes[f"{layer}ffn.shared_experts.{which}.weight"] == "float8_e4m3fn"
        codes, scale = (tensors[f"{layer}ffn.experts.7.{which}.{what}"] for what in ("weight", "scale"))
        assert (codes.dtype.name, scale.dtype.name) == ("int8", "float8_e8m0fnu")
        assert codes.shape[1] == 16 * scale.shape[1]
    for name in ("attn.compressor.wkv", "attn.compressor.wgate", "attn.indexer.weights_proj", "ffn.gate", "attn_norm"):
        assert dtypes[f"{layer}{name}.weight"] == "bfloat16"
    for name in ("attn.compressor.ape", "attn.attn_sink", "hc_attn_fn", "hc_ffn_base", "hc_ffn_scale"):
        assert dtypes[layer + name] == "float32"
    assert dtypes["embed.weight"] == "bfloat16"
    assert dtypes["layers.0.ffn.gate.tid2eid"] == "int64"
    assert dtypes["layers.3.ffn.gate.bias"] == "float32"
    assert (config["head_dim"], config["sliding_window"], config["index_head_dim"]) == (512, 128, 128)
    assert set(config["compress_ratios"]) == {0, 4, 128}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    for name, array in tensors.items():
        assert np.isfinite(array.astype(np.float32)).all(), name
