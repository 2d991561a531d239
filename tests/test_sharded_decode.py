"""Serving a model on meshes of CPU devices, as on one."""

import subprocess
import sys
from pathlib import Path

from cpu_devices import environment_of


def test_a_server_on_a_mesh_is_one_server_a_shard(seed):
    program = Path(__file__).parent / "sharded_decode.py"
    result = subprocess.run(
        [sys.executable, program, str(seed)], env=environment_of(8), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines() == [f"equal: {mesh}" for mesh in ("1 x 2", "2 x 2", "4 x 2", "8 x 1")]
