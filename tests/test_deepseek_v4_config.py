"""DeepseekV4Config: both forms of config.json, what may be left out, and every way in which one can be wrong."""

import json
import math

import jax
import pytest

from dsv4_jax import ConfigError, deepseek_v4_flash
from dsv4_jax.deepseek_v4.config import flash_config, read_config
from dsv4_jax.deepseek_v4.weights import weight_shapes

RATIOS = [0, 0, *[4, 128] * 20, 4]
TYPE_OF_RATIO = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
YARN = {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}


def deepseek() -> dict:
    """What the config.json published with DeepSeek-V4-Flash says, without what all such models share."""
    return {
        "compress_ratios": [*RATIOS, 0],
        "eos_token_id": 1,
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "index_n_heads": 64,
        "index_topk": 512,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_hidden_layers": 43,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "rope_scaling": YARN | {"type": "yarn"},
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "vocab_size": 129280,
    }


def hugging_face() -> dict:
    """The same as ``save_pretrained`` writes it."""
    config = deepseek()
    for name in ("compress_ratios", "num_hash_layers", "rope_scaling"):
        del config[name]
    return config | {
        "eos_token_id": [1],
        "layer_types": [TYPE_OF_RATIO[ratio] for ratio in RATIOS],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0},
            "compress": YARN | {"rope_type": "yarn", "rope_theta": 160000.0, "attention_factor": 1.0},
        },
    }


def inference() -> dict:
    """The same as DeepSeek's inference code spells it."""
    renamed = {
        "hidden_size": "dim",
        "moe_intermediate_size": "moe_inter_dim",
        "num_attention_heads": "n_heads",
        "num_experts_per_tok": "n_activated_experts",
        "num_hash_layers": "n_hash_layers",
        "num_hidden_layers": "n_layers",
        "routed_scaling_factor": "route_scale",
        "scoring_func": "score_func",
    }
    return {renamed.get(name, name): value for name, value in deepseek().items()}


@pytest.mark.parametrize("form", [deepseek, hugging_face, inference])
def test_every_form_says_the_same(form, tmp_path):
    config = read_config(form())
    assert config.spec == deepseek_v4_flash()
    assert config.hashed == (True,) * 3 + (False,) * 40
    assert (config.vocabulary, config.hc_mult, config.hc_sinkhorn_iters, config.hc_eps) == (129280, 4, 20, 1e-6)
    assert (config.q_lora_rank, config.o_lora_rank, config.o_groups) == (1024, 1024, 8)
    assert (config.num_experts, config.experts_per_token, config.expert_width) == (256, 6, 2048)
    assert (config.scoring, config.norm_topk_prob, config.routed_scaling) == ("sqrtsoftplus", True, 1.5)
    assert (config.swiglu_limit, config.end_tokens) == (10.0, (1,))

    (tmp_path / "config.json").write_text(json.dumps(form()))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == config
    hash(config)


def test_flash_without_a_file():
    assert flash_config() == read_config(deepseek())
    assert flash_config(num_experts=32) == read_config(deepseek() | {"n_routed_experts": 32})


def test_weights_of_flash():
    """284 billion, as its model card says, nearly all of them experts."""
    shapes = weight_shapes(read_config(deepseek()))
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert 283e9 < count(shapes) < 285e9
    assert sum(count(layer.ffn.experts) for layer in shapes.layers) == 43 * 256 * 3 * 4096 * 2048
    assert shapes.layers[2].attention.indexer.query.shape == (64 * 128, 1024)
    assert shapes.layers[2].ffn.token_experts.shape == (129280, 6)
    assert shapes.layers[2].ffn.bias is None
    assert shapes.layers[3].ffn.token_experts is None
    assert shapes.layers[3].attention.indexer is None


SHARED = {
    "eos_token_id",
    "hc_eps",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hidden_act",
    "n_shared_experts",
    "norm_topk_prob",
    "scoring_func",
    "tie_word_embeddings",
}


@pytest.mark.parametrize("name", sorted(deepseek()))
def test_what_may_be_left_out(name):
    config = deepseek()
    del config[name]
    if name in SHARED:
        assert read_config(config).spec == deepseek_v4_flash()
    else:
        with pytest.raises(ConfigError, match=name):
            read_config(config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_size": 0}, r"vocabulary must be a positive integer below 2\*\*31, got 0"),
        ({"q_lora_rank": 1024.0}, "q_lora_rank must be a positive integer"),
        ({"swiglu_limit": 0.0}, "swiglu_limit must be a positive number"),
        ({"scoring_func": "relu"}, "sqrtsoftplus, sigmoid, softmax, got 'relu'"),
        ({"num_experts_per_tok": 300}, "300 of 256 experts"),
        ({"o_groups": 7}, "64 heads do not fall into 7"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2; this model is written for 1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"route_scale": 2.5}, "contradicts itself.*routed_scaling_factor.*route_scale"),
        ({"mlp_layer_types": ["moe"] * 43}, "contradicts itself about which layers"),
        ({"mlp_layer_types": ["moe"] * 42}, "each of the 43 layers"),
        ({"mlp_layer_types": ["dense"] * 43}, "hash_moe, moe"),
    ],
)
def test_what_is_wrong_is_said(wrong, message):
    with pytest.raises(ConfigError, match=message):
        read_config(deepseek() | wrong)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_config(tmp_path)
