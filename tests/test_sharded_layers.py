"""A step inside ``jax.shard_map`` is the step: unrolled, scanned over steps and over layers, on two CPU devices."""

import subprocess
import sys
from pathlib import Path

from cpu_devices import environment_of


def test_steps_of_shards_are_the_plain_steps(seed):
    program = Path(__file__).parent / "sharded_layers.py"
    result = subprocess.run(
        [sys.executable, program, str(seed)], env=environment_of(2), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal:") == 6
