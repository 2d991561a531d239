"""The benchmark's case of several devices: two on this CPU."""

import json
import subprocess
import sys

import jax
import pytest
from cpu_devices import environment_of

from dsv4_jax.tools.bench.cases import all_cases
from dsv4_jax.tools.bench.workload import FULL


def test_steps_of_two_devices_stand_beside_one_of_one(tmp_path):
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
    one, *meshes = json.loads(figures.read_text())["cases"]
    assert [case["name"] for case in (one, *meshes)] == ["step/flash/b2", "mesh/flash/b2/2x1", "mesh/flash/b2/1x2"]
    assert [(case["devices"], case["devices_a_shard"]) for case in meshes] == [(2, 1), (2, 2)]
    assert meshes[0]["bytes"] == one["bytes"] > meshes[1]["bytes"]  # of half the heads
    assert meshes[0]["operations"] == one["operations"] > meshes[1]["operations"]
    for mesh in meshes:
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
    assert named() == ["mesh/flash/b64/2x1", "mesh/flash/b64/1x2"]
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert named() == ["mesh/flash/b64/4x1", "mesh/flash/b64/2x2", "mesh/flash/b64/1x4"]
