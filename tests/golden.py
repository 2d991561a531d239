"""Hugging Face's implementation as data (tests/data/dsv4_golden.npz), and what tests of the whole cache take from it.

What the file holds, and how it was made: 703 tokens through a tiny fp32 model with the full cache geometry, one layer
of each kind, cache inputs exact in bfloat16.
"""

import json
from pathlib import Path

import numpy as np
import numpy_reference

with np.load(Path(__file__).parent / "data" / "dsv4_golden.npz") as _file:
    GOLDEN = dict(_file)  # arrays: the file would decompress one anew whenever it is asked
META = json.loads(GOLDEN["meta.json"].tobytes())
POSITIONS = GOLDEN["meta.positions_attn"]
"""The tokens whose attention the file holds, query by query."""

_INPUTS = {"rows": "swa_k", "kv": "kv", "gate": "gate", "index_kv": "idx_kv", "index_gate": "idx_gate"}
_WEIGHTS = {"ape": "ape", "norm": "norm_w", "index_ape": "idx_ape", "index_norm": "idx_norm_w"}


def _layers(names):
    return [
        {ours: GOLDEN[f"L{layer}.{theirs}"] for ours, theirs in names.items() if f"L{layer}.{theirs}" in GOLDEN}
        for layer in range(3)
    ]


def golden_tokens():
    """What the golden tokens bring to each layer, by the harness's names."""
    return _layers(_INPUTS)


def golden_weights():
    """Position biases and norm weights of each layer, likewise."""
    return _layers(_WEIGHTS)


def golden_attention(layer, query, keys):
    """float64 [heads, 512]: a layer's attention of a golden query over keys = values [n, 512], with its sinks."""
    return numpy_reference.attention(GOLDEN[f"L{layer}.q"][query], keys, GOLDEN[f"L{layer}.sinks"])
