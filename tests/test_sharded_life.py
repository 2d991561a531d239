"""Requests in caches of several shards, on meshes of CPU devices, in one process and in two."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_devices import environment_of

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("data", "tensor", "check_vma", "axis_type"),
    [
        (1, 2, True, "Auto"),
        (2, 2, False, "Auto"),
        (2, 2, True, "Explicit"),
        (4, 2, True, "Auto"),
        (8, 1, True, "Explicit"),
    ],
)
def test_requests_live_in_shards_as_in_a_cache_of_their_own(seed, data, tensor, check_vma, axis_type):
    program = [sys.executable, HERE / "sharded_life.py", *map(str, (seed, data, tensor, check_vma, axis_type))]
    result = subprocess.run(program, env=environment_of(data * tensor), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "equal\n"


def test_books_balance_under_a_random_load_of_several_shards(seed):
    program = [sys.executable, HERE / "sharded_load.py", str(seed), "8", "0"]
    result = subprocess.run(program, env=environment_of(2), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.startswith("balanced: 2 shards, 8 steps")


def test_two_processes_each_manage_their_own_shards(seed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = [
        subprocess.Popen(
            [sys.executable, HERE / "sharded_processes.py", str(seed), str(number), str(port)],
            env=environment_of(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for program in programs:
            out, error = program.communicate(timeout=300)
            assert program.returncode == 0, error[-4000:]
            assert out.endswith("equal\n")
    finally:
        for program in programs:
            program.kill()
