"""What storage formats cost: attention of the golden model through every format, compared with the fp32 cache.

`python -m pytest -s tests/test_attention_formats.py` prints the tables of docs/formats.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import GOLDEN, META, POSITIONS, golden_attention, golden_tokens, golden_weights
from harness import SPEC, Driver, inputs_of

from dsv4_jax import PROFILES, begin
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS

TOKENS, TOPK = META["seq"], META["topk"]
EXACT = PROFILES["exact"]
SWA, CSA, HCA = range(3)

COMPONENTS = {"entries": ENTRY_FORMATS, "window": WINDOW_FORMATS, "keys": KEY_FORMATS}
ROUND_TRIP = {"fp32": 0, "bf16": 2**-8, "fp8": 0.03, "fp8_ds_mla": 0.03, "nvfp4": 0.10, "nvfp4_static": 0.10}


@functools.cache
def stored(formats):
    """What the golden request's layers hold after one step: window rows, entries and keys as they are read back."""
    driver = Driver(golden_weights(), formats, slots=1, blocks=8)
    driver._step = jax.jit(_step_and_read, donate_argnums=0)
    driver.feed({driver.admit(golden_tokens()): TOKENS})
    _, read = driver.cache
    return jax.tree.map(np.asarray, read)


def _step_and_read(cache, plan, weights, brought):
    step, read = begin(cache, plan), {"window": []}
    for layer, arrays in enumerate(brought):
        handle = step.layer(layer)
        read["window"].append(handle.stored(arrays["rows"], dtype=jnp.float32))
        compressor = inputs_of(step.plan, SPEC, layer, weights[layer], arrays)
        indexer = inputs_of(step.plan, SPEC, layer, weights[layer], arrays, "index_")
        handle = handle.update(arrays["rows"], compressor, indexer)
        if layer == CSA:
            handle, rows = handle.all_entries(TOKENS // 4, dtype=jnp.float32)
            handle, keys = handle.all_keys(TOKENS // 4, dtype=jnp.float32)
            read |= {"csa": rows.values[0], "keys": keys.values[0]}
            read["queries"] = handle.transform_query(GOLDEN["L1.idx_q"])
        elif layer == HCA:
            handle, rows = handle.all_entries(TOKENS // 128, dtype=jnp.float32)
            read["hca"] = rows.values[0]
        step = handle.step
    return step.end(), read


def chosen(formats, golden_row):
    """The CSA entries that a query attends to, by the stored keys."""
    read, visible = stored(formats), (POSITIONS[golden_row] + 1) // 4
    products = np.maximum(read["queries"][golden_row].astype(np.float64) @ read["keys"][:visible].T, 0)
    scores = GOLDEN["L1.idx_w"][golden_row].astype(np.float64) @ products
    return np.sort(np.argsort(-scores, kind="stable")[:TOPK])


@functools.cache
def attention(formats):
    """float64 [layers, golden queries, heads, 512]: attention with sinks over what is stored."""
    read, outputs = stored(formats), []
    for layer in (SWA, CSA, HCA):
        for golden_row, position in enumerate(POSITIONS):
            keys = [read["window"][layer][max(0, position - 127) : position + 1]]
            if layer == CSA:
                keys.append(read["csa"][chosen(formats, golden_row)])
            elif layer == HCA:
                keys.append(read["hca"][: (position + 1) // 128])
            outputs.append(golden_attention(layer, golden_row, np.concatenate(keys)))
    return np.stack(outputs).reshape(3, len(POSITIONS), *outputs[0].shape)


def only(component, name, hadamard=False):
    """One component in a format, the others in fp32."""
    return dataclasses.replace(EXACT, **{component: name}, keys_hadamard=hadamard)


def relative_errors(formats):
    """Relative L2 error of each layer's attention output against the fp32 cache's."""
    difference = attention(formats) - attention(EXACT)
    norms = [np.linalg.norm(array.reshape(3, -1), axis=1) for array in (difference, attention(EXACT))]
    return norms[0] / norms[1]


def changed_choices(formats):
    """The share of chosen CSA entries that the fp32 keys would not choose."""
    pairs = [(chosen(formats, row), chosen(EXACT, row)) for row in range(len(POSITIONS))]
    return sum(len(np.setdiff1d(*pair)) for pair in pairs) / sum(len(exact) for _, exact in pairs)


def test_the_fp32_cache_attends_as_hugging_face_does():
    expected = np.stack([GOLDEN[f"L{layer}.attn_out"] for layer in (SWA, CSA, HCA)])
    np.testing.assert_allclose(attention(EXACT), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("component", "name"), [(component, name) for component in ("entries", "window") for name in COMPONENTS[component]]
)
def test_attention_is_off_by_no_more_than_the_rows_it_averages(component, name):
    errors = relative_errors(only(component, name))
    assert (errors <= ROUND_TRIP[name]).all()
    touched = [True] * 3 if component == "window" else [False, True, True]
    assert (errors > 0).tolist() == [used and name != "fp32" for used in touched]


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize(
    ("name", "share", "error"),
    [
        ("fp32", 0, 0),
        ("bf16", 0.01, 0.02),
        ("fp8", 0.03, 0.06),
        ("nvfp4", 0.10, 0.15),
        ("nvfp4_static", 0.10, 0.15),
        ("mxfp4", 0.13, 0.20),
    ],
)
def test_quantized_keys_change_few_choices(name, share, error, hadamard):
    """A key's error moves scores by as much, so entries whose scores are that close change places."""
    formats = only("keys", name, hadamard)
    assert changed_choices(formats) <= share
    swa, csa, hca = relative_errors(formats)
    assert swa == hca == 0
    assert csa <= error


@pytest.fixture(scope="module", autouse=True)
def _print_tables(request):
    yield
    if request.config.getoption("capture") != "no":
        return
    rows = [
        (f"{component} {name}{', Hadamard' * hadamard}", only(component, name, hadamard))
        for component, table in COMPONENTS.items()
        for name in table
        for hadamard in ((False, True) if component == "keys" else (False,))
        if name != "fp32"
    ]
    rows += [(f"profile {name}", formats) for name, formats in PROFILES.items() if formats != EXACT]
    print("\n| stored as | SWA layer | CSA layer | HCA layer | choices changed |\n|---|---|---|---|---|")
    for what, formats in rows:
        errors = " | ".join(f"{error:.1e}" if error else "0" for error in relative_errors(formats))
        print(f"| {what} | {errors} | {changed_choices(formats):.1%} |")
