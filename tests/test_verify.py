"""`--verify`: a served run agrees with the computation without a cache, and what is lost is seen."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from served import EXACT, check, exact_run, exact_server, make_server

from dsv4_jax import PROFILES, CacheFormats
from dsv4_jax.deepseek_v4.model import Choices
from dsv4_jax.deepseek_v4.serve import Request
from dsv4_jax.deepseek_v4.text import load_text
from dsv4_jax.deepseek_v4.verify import tolerances
from dsv4_jax.layout.formats import ENTRY_FORMATS, HCA_TAILS, KEY_FORMATS, WINDOW_FORMATS

TEXT = np.frombuffer(load_text().encode(), np.uint8).astype(np.int32)
DEFAULT = CacheFormats()  # test_decode_cli.py verifies it, in chunks
TOKEN_BY_TOKEN = [
    CacheFormats("bf16", "fp8", "bf16", keys_hadamard=True),
    CacheFormats("fp8_ds_mla", "fp8_ds_mla", "fp8"),
    CacheFormats("nvfp4", "fp32", "mxfp4", hca_tail="running"),
    CacheFormats("nvfp4_static", "bf16", "nvfp4_static", global_scale=0.25),
]


def test_every_format_is_served():
    everywhere = [*TOKEN_BY_TOKEN, EXACT, DEFAULT]
    assert {one.entries for one in everywhere} == set(ENTRY_FORMATS)
    assert {one.window for one in everywhere} == set(WINDOW_FORMATS)
    assert {one.keys for one in everywhere} == set(KEY_FORMATS)
    assert {one.hca_tail for one in everywhere} == set(HCA_TAILS)


def test_chunks_mixed_with_decode_agree(seed):
    """A slot is used twice."""
    result = check(exact_server(seed), exact_run(seed))
    assert result.positions >= 3 * 12
    assert result.passed
    assert result.entries.flips == result.experts.flips == 0


@pytest.mark.parametrize("formats", TOKEN_BY_TOKEN, ids=lambda one: f"{one.entries}-{one.window}-{one.keys}")
def test_a_run_agrees_whatever_is_stored(formats, seed):
    """One request, token by token; test_chunking.py and test_update_formats.py have chunks of every format."""
    server = make_server(formats, seed, slots=1, chunk=1, max_context=256)
    result = check(server, server.serve([Request(TEXT[:180], 20, TEXT[180:200])]))
    assert result.positions == 200
    assert result.passed


@pytest.mark.parametrize("component", ["csa_entries", "window", "csa_tail", "hca_tail", "csa_keys"])
def test_what_was_lost_is_seen(component, seed, monkeypatch):
    """A row of a tail or window, or a few entries or keys, lost between two steps, are found."""
    server = exact_server(seed)
    # 300 tokens in chunks of 96: what is lost at position 192 was still to be pooled, attended to or chosen from.
    request = Request(TEXT[:300], 12)
    run, steps = server._step, 0

    def losing(cache, plan, *rest):
        nonlocal steps
        steps += 1
        if steps == 3:
            slot, start = int(plan.request_slot[0]), int(plan.request_start[0])
            assert start == 192
            where = {
                "window": (1, slot, (start - 1) % 128),
                "csa_entries": (0, cache.block_table[slot, 0], slice(8)),
                "csa_keys": (0, cache.block_table[slot, 0], slice(8)),
                "csa_tail": (0, slot, 0, (start - 1) % 8),
                "hca_tail": (0, slot, 0, (start - 1) % 128),
            }[component]
            pool = np.array(cache.arrays[component])
            pool[where] = 0
            cache = cache.with_arrays({component: jnp.asarray(pool)})
        return run(cache, plan, *rest)

    monkeypatch.setattr(server, "_step", losing)
    assert not check(server, server.serve([request])).passed


def path_of(key) -> str:
    return jax.tree_util.keystr(key, simple=True, separator=".")


def changed(weights, path: str):
    """The weights, one of them shifted along its last axis, or negative where it is one number."""

    def change(key, leaf):
        if path_of(key) != path:
            return leaf
        return np.roll(np.asarray(leaf), 1, axis=-1) if leaf.size > 1 else -np.asarray(leaf)

    return jax.tree_util.tree_map_with_path(change, weights)


def test_every_weight_has_an_effect(rng, seed):
    """A model with another weight is not the same model: verification against it fails.

    Eight weights, others in every run. Scales of codes are left out: those before a norm need not have an effect.
    """
    server, served = exact_server(seed), exact_run(seed)[:1]
    paths = [path_of(key) for key, _ in jax.tree_util.tree_leaves_with_path(server.weights)]
    tried = rng.permutation([path for path in paths if not path.endswith(".scales")])[:8]
    unseen = [path for path in tried if check(server, served, changed(server.weights, path)).passed]
    assert unseen == []


def altered(one, position: int, **changes):
    """A served request whose record of a position is changed: logits, entries or experts by a function of their row."""
    record = one.steps[position]
    logits, choices = np.array(record.logits), Choices(*map(np.array, record.choices))
    if "logits" in changes:
        changes["logits"](logits[record.row])
    for name in changes.keys() - {"logits"}:
        changes[name](getattr(choices, name)[:, record.column])
    steps = [*one.steps]
    steps[position] = record._replace(logits=logits, choices=choices)
    return dataclasses.replace(one, steps=steps)


@pytest.mark.parametrize("defect", ["repeated", "missing", "future"])
def test_an_impossible_choice_of_entries_is_seen(defect, seed):
    one = exact_run(seed)[0]

    def spoil(entries):
        assert (entries[0] >= 0).all()  # by the end there are more entries than the indexer may choose
        entries[0, 0] = {"repeated": entries[0, 1], "missing": -1, "future": one.total // 4}[defect]

    result = check(exact_server(seed), [altered(one, -1, entries=spoil)])
    assert result.entries.malformed == 1
    assert result.experts.malformed == 0
    assert not result.passed


@pytest.mark.parametrize(("defect", "layer"), [("repeated", 1), ("beyond", 1), ("another", 0)])
def test_an_impossible_choice_of_experts_is_seen(defect, layer, seed):
    """Layer 0 looks its experts up, so that any other choice is wrong."""
    one = exact_run(seed)[0]

    def spoil(experts):
        changed = {"repeated": experts[layer, 1], "beyond": 8, "another": (experts[layer, 0] + 1) % 8}
        experts[layer, 0] = changed[defect]

    result = check(exact_server(seed), [altered(one, -1, experts=spoil)])
    assert result.experts.malformed == 1
    assert result.entries.malformed == 0
    assert not result.passed


def test_a_worse_expert_is_seen(seed):
    """A choice that could be, but not by these scores."""
    one = exact_run(seed)[0]

    def spoil(experts):
        experts[1, 0] = next(expert for expert in itertools.count() if expert not in experts[1])

    result = check(exact_server(seed), [altered(one, -1, experts=spoil)])
    assert (result.experts.malformed, result.experts.flips) == (0, 1)
    assert result.experts.gap > result.experts.score_tolerance
    assert not result.passed


def test_nan_is_seen(seed):
    one, *others = exact_run(seed)
    spoiled = altered(one, 0, logits=lambda row: row.fill(np.nan))
    assert not check(exact_server(seed), [spoiled, *others]).passed


def test_logits_of_nothing_but_zeros_are_not_close(seed):
    server = exact_server(seed)
    silent = server.weights._replace(norm=jnp.zeros_like(server.weights.norm))
    assert not check(server, exact_run(seed)[:1], silent).passed


def test_nothing_compared_is_not_passed(seed):
    assert not check(exact_server(seed), []).passed


def test_every_format_has_tolerances_and_the_coarsest_decides():
    for table, component in ((ENTRY_FORMATS, "entries"), (WINDOW_FORMATS, "window")):
        for name in table:
            assert 0 < tolerances(dataclasses.replace(EXACT, **{component: name})).logit_tolerance < 0.1
    coarse = tolerances(dataclasses.replace(EXACT, entries="bf16", window="fp8"))
    assert coarse.logit_tolerance == tolerances(dataclasses.replace(EXACT, window="fp8")).logit_tolerance
    assert coarse.logit_tolerance > tolerances(PROFILES["exact"]).logit_tolerance
    for name in KEY_FORMATS:
        keys = tolerances(dataclasses.replace(EXACT, keys=name))
        assert keys.logit_tolerance == tolerances(EXACT).logit_tolerance
        assert keys.entries.score_tolerance >= tolerances(EXACT).entries.score_tolerance
    assert tolerances(EXACT, jnp.bfloat16).logit_tolerance > tolerances(EXACT).logit_tolerance


def test_a_format_nobody_measured_is_named(monkeypatch):
    monkeypatch.delitem(tolerances.__globals__["_LOGITS"], "nvfp4")
    with pytest.raises(ValueError, match=r"nvfp4.*never measured"):
        tolerances(CacheFormats("nvfp4"))
    with pytest.raises(ValueError, match=r"float16.*never measured"):
        tolerances(DEFAULT, jnp.float16)
