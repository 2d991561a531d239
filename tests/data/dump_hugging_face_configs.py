"""What Hugging Face's DeepseekV4Config and its rotary embedding read from many configs, for tests/test_config.py.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/data/dump_hugging_face_configs.py

``values`` is what the model computes with; ``null`` where the config class refuses.
"""

import json
import logging
import tempfile
from pathlib import Path

from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
MAIN = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125}
COMPRESS = {
    "rope_type": "yarn",
    "rope_theta": 160000.0,
    "factor": 16,
    "original_max_position_embeddings": 65536,
    "partial_rotary_factor": 0.125,
}
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0, 0, 0],
    "index_n_heads": 16,
    "index_topk": 32,
    "qk_rope_head_dim": 64,
}
RELEASED = {
    "head_dim": 512,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "max_position_embeddings": 1048576,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "sliding_window": 128,
    "compress_rope_theta": 160000,
}
FLASH = RELEASED | {
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "index_topk": 512,
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4],
}
PRO = RELEASED | {
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "index_topk": 1024,
    "num_hidden_layers": 61,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4],
}


def nested(main=None, **compress):
    return {"rope_parameters": {"main": MAIN | (main or {}), "compress": COMPRESS | compress}}


def without(section, name):
    return {key: value for key, value in section.items() if key != name}


def mtp(config, layers):
    return config | {"compress_ratios": config["compress_ratios"] + [0] * layers}


CONFIGS = {
    "flash, 1 MTP layer listed": mtp(FLASH, 1),
    "flash, 3 MTP layers listed": mtp(FLASH, 3),
    "flash, none listed": FLASH,
    "pro, 1 MTP layer listed": mtp(PRO, 1),
    "pro, 3 MTP layers listed": mtp(PRO, 3),
    "num_nextn_predict_layers 0": mtp(FLASH, 3) | {"num_nextn_predict_layers": 0},
    "rates by name": SMALL | {"rope_scaling": YARN, "compress_rate_csa": 4, "compress_rate_hca": 128},
    "flat, attention_factor null": SMALL | {"rope_scaling": YARN | {"attention_factor": None}},
    "flat, attention_factor 1.3": SMALL | {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "flat, mscale": SMALL | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "flat, attention_factor null, mscale": SMALL
    | {"rope_scaling": YARN | {"attention_factor": None, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "flat rope_parameters": SMALL | {"rope_parameters": YARN},
    "flat rope_parameters, rope_theta": SMALL | {"rope_parameters": YARN | {"rope_theta": 10000.0}},
    "flat rope_parameters, other rope_theta": SMALL | {"rope_parameters": YARN | {"rope_theta": 50000.0}},
    "flat, other thetas": SMALL | {"rope_scaling": YARN, "rope_theta": 50000, "compress_rope_theta": 320000.0},
    "flat, beta null": SMALL | {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": None}},
    "flat, factor 40, beta 64 and 2": SMALL | {"rope_scaling": YARN | {"factor": 40, "beta_fast": 64, "beta_slow": 2}},
    "flat, type default": SMALL | {"rope_scaling": {"type": "default"}},
    "flat, truncate false": SMALL | {"rope_scaling": YARN | {"truncate": False}},
    "flat, no original length": SMALL | {"rope_scaling": without(YARN, "original_max_position_embeddings")},
    "nested": SMALL | nested(),
    "nested, attention_factor null": SMALL | nested(attention_factor=None),
    "nested, attention_factor 1": SMALL | nested(attention_factor=1.0),
    "nested, attention_factor 0.9": SMALL | nested(attention_factor=0.9),
    "nested, mscale": SMALL | nested(mscale=1.0, mscale_all_dim=0.5),
    "nested, mscale_all_dim 0": SMALL | nested(mscale=1.0, mscale_all_dim=0),
    "nested, factor 4": SMALL | nested(factor=4),
    "nested, factor 1": SMALL | nested(factor=1),
    "nested, main yarn": SMALL | {"rope_parameters": {"main": COMPRESS, "compress": COMPRESS}},
    "nested, both plain": SMALL | {"rope_parameters": {"main": MAIN, "compress": MAIN}},
    "nested, stale thetas": SMALL
    | nested({"rope_theta": 20000.0}, rope_theta=320000.0)
    | {"rope_theta": 50000, "compress_rope_theta": 70000},
    "nested, main without theta": SMALL
    | {"rope_parameters": {"main": without(MAIN, "rope_theta"), "compress": COMPRESS}, "rope_theta": 50000},
    "nested, compress without theta": SMALL
    | {"rope_parameters": {"main": MAIN, "compress": without(COMPRESS, "rope_theta")}},
    "nested in rope_scaling": SMALL | {"rope_scaling": nested()["rope_parameters"]},
    "nested, compress alone": SMALL | {"rope_parameters": {"compress": COMPRESS}},
    "nested, main alone": SMALL | {"rope_parameters": {"main": MAIN}},
    "nested, no type": SMALL | {"rope_parameters": {"main": MAIN, "compress": without(COMPRESS, "rope_type")}},
    "nested and flat": SMALL | nested() | {"rope_scaling": YARN},
    "null": SMALL | {"rope_scaling": None},
    "empty": SMALL | {"rope_scaling": {}},
    "no type": SMALL | {"rope_scaling": without(YARN, "type")},
    "a string": SMALL | {"rope_scaling": "yarn"},
    "a list": SMALL | {"rope_scaling": [1]},
    "a number": SMALL | {"rope_scaling": 3},
    "true": SMALL | {"rope_scaling": True},
    "rope_parameters a string": SMALL | {"rope_parameters": "yarn"},
}


def values(config):
    """What the cache has to know, as Hugging Face computes it."""
    rotary = DeepseekV4RotaryEmbedding(config)
    ropes = {
        label: {
            "theta": config.rope_parameters[label]["rope_theta"],
            "attention_factor": getattr(rotary, f"{label}_attention_scaling"),
            "frequencies": [value.hex() for value in getattr(rotary, f"{label}_inv_freq").double().tolist()],
        }
        for label in ("main", "compress")
    }
    names = ("hidden_size", "num_attention_heads", "head_dim", "qk_rope_head_dim", "index_n_heads", "index_head_dim")
    names += ("index_topk", "sliding_window", "rms_norm_eps", "max_position_embeddings", "layer_types")
    return {name: getattr(config, name) for name in names} | {"ropes": ropes}


def main():
    logging.disable(logging.CRITICAL)
    cases = []
    for name, config in CONFIGS.items():
        written = json.dumps(config)
        try:
            read = DeepseekV4Config(**json.loads(written))
        except Exception:
            cases.append({"name": name, "config": config, "values": None})
            continue
        cases.append({"name": name, "config": config, "values": values(read)})
        with tempfile.TemporaryDirectory() as folder:
            read.save_pretrained(folder)
            saved = json.loads((Path(folder) / "config.json").read_text())
            cases.append({"name": f"{name}, saved", "config": saved, "values": values(DeepseekV4Config(**saved))})
    text = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
    Path(__file__).with_suffix("").with_name("hugging_face_configs.json").write_text(text)
    print(len(cases), "configs")


if __name__ == "__main__":
    main()
