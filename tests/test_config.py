"""ModelSpec: both forms of config.json, the presets, and every way in which a config can be wrong."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.spec.config_json import model_spec
from dsv4_jax.spec.kinds import LayerKind
from dsv4_jax.spec.model import ConfigError, LayerSpec, RopeSpec
from dsv4_jax.spec.presets import deepseek_v4_flash, deepseek_v4_pro, tiny_spec
from dsv4_jax.spec.rotary import inverse_frequencies

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA
MAIN_ROPE = RopeSpec(10_000.0)
COMPRESS_ROPE = RopeSpec(160_000.0, 16.0, 65536, 32, 1, 64)
TYPE_OF_RATIO = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}

FLASH_RATIOS = [0, 0] + [4, 128] * 20 + [4]
PRO_RATIOS = [128, 128] + [4, 128] * 29 + [4]
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 16,
    "original_max_position_embeddings": 65536,
    "type": "yarn",
}


def deepseek_flash() -> dict:
    """What concerns the cache in the config.json published with DeepSeek-V4-Flash."""
    return {
        "model_type": "deepseek_v4",
        "head_dim": 512,
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "max_position_embeddings": 1048576,
        "num_attention_heads": 64,
        "num_hidden_layers": 43,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": dict(YARN),
        "rope_theta": 10000,
        "sliding_window": 128,
        "transformers_version": "4.57.1",
        "compress_rope_theta": 160000,
        "compress_ratios": [*FLASH_RATIOS, 0],
    }


def hugging_face() -> dict:
    """What concerns the cache in a config.json that transformers 5.23.0 wrote with save_pretrained."""
    return {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "compress_rope_theta": 160000.0,
        "head_dim": 512,
        "hidden_size": 64,
        "index_head_dim": 128,
        "index_n_heads": 16,
        "index_topk": 32,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "pad_token_id": None,
        "partial_rotary_factor": 0.125,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "compress": {
                "attention_factor": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 16,
                "original_max_position_embeddings": 65536,
                "partial_rotary_factor": 0.125,
                "rope_theta": 160000.0,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "main": {"partial_rotary_factor": 0.125, "rope_theta": 10000.0, "rope_type": "default"},
        },
        "rope_theta": 10000.0,
        "sliding_window": 128,
        "transformers_version": "5.23.0",
    }


def hugging_face_flat() -> dict:
    """The older flat form of the same."""
    config = hugging_face()
    for name in ("compress_rates", "rope_parameters", "partial_rotary_factor"):
        del config[name]
    return config | {
        "compress_rate_csa": 4,
        "compress_rate_hca": 128,
        "rope_scaling": YARN | {"rope_type": "yarn"},
    }


def deepseek_inference() -> dict:
    """The names of DeepSeek's inference code."""
    return {
        "dim": 4096,
        "n_layers": 43,
        "n_mtp_layers": 1,
        "n_heads": 64,
        "head_dim": 512,
        "rope_head_dim": 64,
        "norm_eps": 1e-6,
        "window_size": 128,
        "compress_ratios": [*FLASH_RATIOS, 0],
        "compress_rope_theta": 160000.0,
        "original_seq_len": 65536,
        "rope_theta": 10000.0,
        "rope_factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
    }


def test_presets_have_the_published_geometry():
    flash, pro = deepseek_v4_flash(), deepseek_v4_pro()
    assert [layer.kind.ratio for layer in flash.layers] == FLASH_RATIOS
    assert [layer.kind.ratio for layer in pro.layers] == PRO_RATIOS
    assert [flash.count(kind) for kind in (SWA, CSA, HCA)] == [2, 21, 20]
    assert [pro.count(kind) for kind in (SWA, CSA, HCA)] == [0, 30, 31]
    sizes = [
        (spec.hidden_size, spec.num_heads, spec.index_num_heads, spec.index_topk) for spec in (flash, pro, tiny_spec())
    ]
    assert sizes == [(4096, 64, 64, 512), (7168, 128, 64, 1024), (128, 2, 4, 32)]
    assert tiny_spec().layer_kinds == (SWA, CSA, HCA, CSA)
    for spec in (flash, pro, tiny_spec()):
        assert (spec.head_dim, spec.rope_dim, spec.index_head_dim, spec.window) == (512, 64, 128, 128)
        assert (spec.norm_eps, spec.max_position) == (1e-6, 1 << 20)
        for layer in spec.layers:
            assert layer.rope == (MAIN_ROPE if layer.kind is SWA else COMPRESS_ROPE)


def test_mtp_layer_of_the_presets_is_a_last_sliding_window():
    for preset in (deepseek_v4_flash, deepseek_v4_pro):
        assert preset(include_mtp=True).layers == (*preset().layers, LayerSpec(SWA, MAIN_ROPE))


@pytest.mark.parametrize("config", [deepseek_flash, deepseek_inference])
def test_deepseek_form(config):
    assert model_spec(config()) == deepseek_v4_flash()
    assert model_spec(config(), include_mtp=True) == deepseek_v4_flash(include_mtp=True)
    without_mtp = config()
    without_mtp["compress_ratios"].pop()
    assert model_spec(without_mtp) == deepseek_v4_flash()


@pytest.mark.parametrize(
    ("config", "count"), [(deepseek_flash, "num_nextn_predict_layers"), (deepseek_inference, "n_mtp_layers")]
)
@pytest.mark.parametrize("counted", [0, 1, 3])
@pytest.mark.parametrize("listed", [1, 3])
def test_mtp_layers_are_what_is_listed_beyond_the_layers(config, count, counted, listed):
    released = config() | {count: counted, "compress_ratios": [*FLASH_RATIOS, *[0] * listed]}
    assert model_spec(released) == deepseek_v4_flash()
    expected = (*deepseek_v4_flash().layers, *[LayerSpec(SWA, MAIN_ROPE)] * listed)
    assert model_spec(released, include_mtp=True).layers == expected


@pytest.mark.parametrize("config", [hugging_face, hugging_face_flat])
def test_hugging_face_form(config):
    expected = dataclasses.replace(
        tiny_spec(),
        hidden_size=64,
        index_num_heads=16,
        layers=(LayerSpec(SWA, MAIN_ROPE), LayerSpec(CSA, COMPRESS_ROPE), LayerSpec(HCA, COMPRESS_ROPE)),
    )
    assert model_spec(config()) == expected


HUGGING_FACE = json.loads((Path(__file__).parent / "data" / "hugging_face_configs.json").read_text())
REFUSED = {
    "flat rope_parameters, other rope_theta": "rope_parameters.rope_theta says 50000",
    "flat, truncate false": "truncate",
    "flat, truncate false, saved": "truncate",
    "flat, no original length": "lacks original_max_position_embeddings",
    "nested, compress without theta": "rope_parameters.compress lacks rope_theta",
    "nested, compress alone": "compress alone",
    "nested, main alone": "main alone",
    "nested, no type": "no type",
    "nested and flat": "contradicts itself",
    "no type": "no type",
}


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in HUGGING_FACE])
def test_what_hugging_face_reads_is_read_to_the_same_values(case):
    """Or refused: where Hugging Face refuses it, and where it passes over something that the config says."""
    values = case["values"]
    if values is None or case["name"] in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED.get(case["name"], "must be a section")):
            model_spec(case["config"])
        return
    spec = model_spec(case["config"])
    assert [TYPE_OF_RATIO[layer.kind.ratio] for layer in spec.layers] == values["layer_types"]
    for name, theirs in {
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "head_dim": "head_dim",
        "rope_dim": "qk_rope_head_dim",
        "index_num_heads": "index_n_heads",
        "index_head_dim": "index_head_dim",
        "index_topk": "index_topk",
        "window": "sliding_window",
        "norm_eps": "rms_norm_eps",
        "max_position": "max_position_embeddings",
    }.items():
        assert getattr(spec, name) == values[theirs], name
    for layer in spec.layers:
        rope = values["ropes"]["main" if layer.kind is SWA else "compress"]
        assert (layer.rope.theta, layer.rope.attention_factor) == (rope["theta"], rope["attention_factor"])
        frequencies = np.array([float.fromhex(value) for value in rope["frequencies"]], np.float32)
        np.testing.assert_array_max_ulp(inverse_frequencies(layer.rope), frequencies, maxulp=2)


def test_both_forms_of_one_random_model_are_the_same_spec(rng):
    ratios = rng.choice([0, 4, 128], size=rng.integers(2, 40)).tolist()
    by_ratio = deepseek_flash() | {"num_hidden_layers": len(ratios), "compress_ratios": [*ratios, 0]}
    by_type = {name: by_ratio[name] for name in by_ratio if name != "compress_ratios"}
    by_type["layer_types"] = [TYPE_OF_RATIO[ratio] for ratio in ratios]
    spec = model_spec(by_ratio)
    assert [layer.kind.ratio for layer in spec.layers] == ratios
    assert spec == model_spec(by_type) == model_spec(by_ratio | by_type)
    for layer, ratio in enumerate(ratios):
        assert spec.kind_index(layer) == ratios[:layer].count(ratio)


def test_kind_index_refuses_a_layer_that_is_not_there():
    for layer in (-1, 4):
        with pytest.raises(IndexError, match="layers 0 to 3"):
            tiny_spec().kind_index(layer)


def test_config_is_read_from_a_file_or_its_folder(tmp_path):
    folder = tmp_path / "some-model"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        model_spec(folder)
    (folder / "config.json").write_text(json.dumps(deepseek_flash()))
    for path in (folder, str(folder / "config.json")):
        assert model_spec(path) == deepseek_v4_flash()
        assert model_spec(path).name == "some-model"
    for text in ("{", "[]", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            model_spec(folder)


def test_what_all_models_share_may_be_left_out():
    config = deepseek_flash()
    shared = ("head_dim", "qk_rope_head_dim", "index_head_dim", "sliding_window", "rms_norm_eps", "rope_theta")
    for name in (*shared, "compress_rope_theta", "max_position_embeddings", "num_nextn_predict_layers"):
        del config[name]
    assert model_spec(config) == deepseek_v4_flash()


def test_a_model_of_sliding_windows_needs_no_compression_settings():
    config = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "compress_ratios": [0, 0]}
    assert model_spec(config).layers == (LayerSpec(SWA, MAIN_ROPE),) * 2


def test_null_rope_scaling_means_none():
    spec = model_spec(deepseek_flash() | {"rope_scaling": None})
    assert spec.layers[2].rope == RopeSpec(160_000.0)


@pytest.mark.parametrize(
    "name",
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "index_n_heads",
        "index_topk",
        "compress_ratios",
        "rope_scaling",
    ],
)
def test_what_is_missing_is_named(name):
    config = deepseek_flash()
    del config[name]
    with pytest.raises(ConfigError, match=f"lacks .*{name}"):
        model_spec(config)


def test_empty_config_is_refused():
    with pytest.raises(ConfigError, match="lacks"):
        model_spec({})


def test_mtp_layer_must_be_described_to_be_included():
    with pytest.raises(ConfigError, match="layer_types describes only the 3 layers"):
        model_spec(hugging_face(), include_mtp=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": [TYPE_OF_RATIO[4]] * 43}, [r"compress_ratios\[0\]", r"layer_types\[0\]", "SWA", "CSA"]),
        ({"compress_ratios": FLASH_RATIOS[:-1]}, ["compress_ratios lists 42", "num_hidden_layers says 43"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads says 2", "every DeepSeek-V4 model says 1"]),
        ({"dim": 4097}, ["hidden_size says 4096", "dim says 4097"]),
        ({"window_size": 64}, ["sliding_window says 128", "window_size says 64"]),
        (
            {"partial_rotary_factor": 0.25},
            ["qk_rope_head_dim says 64", "partial_rotary_factor of head_dim 512 says 128"],
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}},
            ["rope_theta says 10000", "rope_parameters.rope_theta says 500000"],
        ),
        (
            {"rope_parameters": {"main": {"rope_theta": 1e4}, "compress": YARN | {"rope_theta": 1.6e5}}},
            ["rope_parameters.compress says.*attention_factor=1.27", "rope_scaling says.*attention_factor=1.0"],
        ),
        ({"rope_parameters": YARN | {"factor": 8}}, ["rope_parameters says.*factor=8", "rope_scaling says.*factor=16"]),
        ({"original_seq_len": 0}, ["rope_scaling says.*factor=16", "original_seq_len.*factor=1"]),
        ({"compress_rates": {"compressed_sparse_attention": 8}}, ["8 tokens into one CSA entry", "built for 4"]),
        ({"compress_rate_hca": 64}, ["64 tokens into one HCA entry", "built for 128"]),
        (
            {"compress_rate_csa": 4, "compress_rates": {"compressed_sparse_attention": 8}},
            ["compress_rates.compressed_sparse_attention says 8", "compress_rate_csa says 4"],
        ),
    ],
)
def test_a_contradiction_names_both_sides(changes, named):
    with pytest.raises(ConfigError) as error:
        model_spec(deepseek_flash() | changes)
    for part in named:
        error.match(part)


@pytest.mark.parametrize("ratio", [1, 2, 8, -4, True, "4", None, [4]])
def test_only_the_ratios_the_kernels_are_built_for(ratio):
    config = deepseek_flash()
    config["compress_ratios"][5] = ratio
    with pytest.raises(ConfigError, match=r"layer 5 .*built for 0, 4, 128"):
        model_spec(config)


def test_unknown_layer_type_is_refused():
    config = hugging_face()
    config["layer_types"][1] = "full_attention"
    with pytest.raises(ConfigError, match=r"layer 1 'full_attention'.*'sliding_attention'"):
        model_spec(config)


@pytest.mark.parametrize(("name", "built"), [("head_dim", 512), ("qk_rope_head_dim", 64), ("index_head_dim", 128)])
def test_only_the_widths_the_kernels_are_built_for(name, built):
    with pytest.raises(
        ConfigError, match=f"{name.removeprefix('qk_rope_head_')}.* is 96; the kernels are built for {built}"
    ):
        model_spec(deepseek_flash() | {name: 96})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": YARN | {"type": "linear"}}, "rope type 'linear'"),
        ({"rope_scaling": YARN | {"factor": None}}, "rope_scaling asks for YaRN and lacks factor"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor >= 1"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling asks for truncate: false"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor > 0"),
        ({"rope_scaling": YARN | {"attention_factor": "1"}}, "attention_factor > 0"),
        ({"rope_scaling": YARN | {"attention_factor": None, "mscale": "1"}}, "rope_scaling has mscale '1'"),
        ({"rope_scaling": {"factor": 16, "beta_fast": 32}}, "rope_scaling has beta_fast, factor and no type"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be a section"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be a section"),
        ({"rope_scaling": 3}, "rope_scaling is 3; it must be a section"),
        ({"rope_scaling": True}, "rope_scaling is True; it must be a section"),
        ({"rope_parameters": False}, "rope_parameters is False; it must be a section"),
        ({"rope_parameters": {"main": 1e4, "compress": YARN}}, "rope_parameters.main is 10000.0; it must be a section"),
        ({"rope_parameters": {"compress": YARN}}, "rope_parameters has a part compress alone"),
        ({"compress_rates": 4}, "compress_rates is 4; it must be a section"),
        ({"num_hidden_layers": 44.5}, r"num_hidden_layers must be a positive integer below 2\*\*31, got 44.5"),
        ({"num_hidden_layers": True}, r"num_hidden_layers must be a positive integer below 2\*\*31, got True"),
        ({"rope_theta": "10000"}, "theta > 1"),
        ({"num_attention_heads": 0}, r"num_heads must be a positive integer below 2\*\*31, got 0"),
        ({"index_topk": -1}, "index_topk must be a positive integer"),
        ({"max_position_embeddings": 2**24 + 1}, "max_position is 16777217"),
        ({"rms_norm_eps": 0}, "norm_eps must be a positive number"),
        ({"compress_ratios": "0,4"}, "compress_ratios must be a list"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        model_spec(deepseek_flash() | changes)
