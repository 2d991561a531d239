"""A step inside ``jax.shard_map`` is the step: unrolled, scanned over steps and over layers, on two CPU devices."""

import os
import subprocess
import sys
from pathlib import Path


def test_steps_of_shards_are_the_plain_steps(seed):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    program = Path(__file__).parent / "sharded_layers.py"
    result = subprocess.run(
        [sys.executable, program, str(seed)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal:") == 6
