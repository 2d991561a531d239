"""The benchmark's case of several devices: two on this CPU."""

import json
import subprocess
import sys

import jax
import pytest
from cpu_devices import environment_of

from dsv4_jax.tools.bench.cases import all_cases
from dsv4_jax.tools.bench.workload import FULL


def test_a_step_of_two_shards_stands_beside_one_of_one(tmp_path):
    figures = tmp_path / "mesh.json"
    options = ["--tiny", "--only", "^(step|mesh)/flash", "--json", figures]
    result = subprocess.run(
        [sys.executable, "-m", "dsv4_jax", "bench", *options],
        env=environment_of(2),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    one, mesh = json.loads(figures.read_text())["cases"]
    assert (one["name"], mesh["name"], mesh["devices"]) == ("step/flash/b2", "mesh/flash/b2x2", 2)
    assert mesh["native_calls"] == one["native_calls"] > 0
    alone, times = mesh["one_device_microseconds"], mesh["times_one_device"]
    if alone > 0:  # so small a difference of times may be anything
        assert times == pytest.approx(mesh["microseconds"] / alone, rel=1e-3)
        assert f"{times:.3f}" in result.stdout
    assert "times as long" in result.stdout


def test_there_is_a_case_where_there_are_several_devices(monkeypatch):
    named = lambda: [case.name for case in all_cases(FULL) if case.name.startswith("mesh/")]  # noqa: E731
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert named() == []
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert named() == ["mesh/flash/b64x2"]
