"""`--verify` knows every format: a served run agrees with one without a cache, however it is stored."""

import dataclasses

import pytest
from test_example import check, make_requests, make_server

from dsv4_jax import CacheFormats
from dsv4_jax.example.verify import tolerances
from dsv4_jax.layout.formats import ENTRY_FORMATS, HCA_TAILS, KEY_FORMATS, PROFILES, WINDOW_FORMATS

SERVED = [
    CacheFormats("fp8_ds_mla", "fp8_ds_mla", "fp8"),
    CacheFormats("nvfp4", "fp32", "mxfp4", hca_tail="running"),
    CacheFormats("nvfp4_static", "bf16", "nvfp4_static", global_scale=0.25),
]
# What test_example.py serves.
SERVED_ELSEWHERE = [PROFILES["exact"], PROFILES["default"], CacheFormats("bf16", "fp8", "bf16")]


def test_every_format_is_served():
    everywhere = SERVED + SERVED_ELSEWHERE
    assert {one.entries for one in everywhere} == set(ENTRY_FORMATS)
    assert {one.window for one in everywhere} == set(WINDOW_FORMATS)
    assert {one.keys for one in everywhere} == set(KEY_FORMATS)
    assert {one.hca_tail for one in everywhere} == set(HCA_TAILS)


@pytest.mark.parametrize("formats", SERVED, ids=lambda one: f"{one.entries}-{one.window}-{one.keys}")
def test_a_run_agrees_whatever_is_stored(formats, seed):
    server = make_server(formats, seed)
    result = check(server, server.serve(make_requests(seed)))
    assert result.passed
    assert result.positions > 0


def test_every_format_has_tolerances_and_the_coarsest_decides():
    exact = PROFILES["exact"]
    for table, component in ((ENTRY_FORMATS, "entries"), (WINDOW_FORMATS, "window")):
        for name in table:
            alone = tolerances(dataclasses.replace(exact, **{component: name}))
            assert 0 < alone[0] < 0.1
    assert tolerances(dataclasses.replace(exact, entries="bf16", window="fp8"))[0] >= 3e-3
    for name in KEY_FORMATS:
        assert tolerances(dataclasses.replace(exact, keys=name))[0] == tolerances(exact)[0]


def test_a_format_nobody_measured_is_named(monkeypatch):
    monkeypatch.delitem(tolerances.__globals__["_LOGITS"], "nvfp4")
    with pytest.raises(ValueError, match=r"nvfp4.*never measured"):
        tolerances(CacheFormats("nvfp4"))
