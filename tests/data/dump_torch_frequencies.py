"""torch's plain rotary frequencies for many theta, by each of its code paths for CPUs, for tests/test_rotary.py.

pip install torch==2.13.0 && python tests/data/dump_torch_frequencies.py
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PROCESSORS = ("default", "avx2", "avx512")
THETAS = np.array([10_000, 160_000, 50_000, 320_000, *range(20_000, 1_000_000, 20_000)], np.float64)
FREQUENCIES = """
import sys, numpy as np, torch
thetas = np.frombuffer(sys.stdin.buffer.read(), np.float64)
rows = [1.0 / (float(theta) ** (torch.arange(0, 64, 2, dtype=torch.float) / 64)) for theta in thetas]
sys.stdout.buffer.write(torch.stack(rows).numpy().tobytes())
"""


def main():
    frequencies = {}
    for processor in PROCESSORS:
        done = subprocess.run(
            [sys.executable, "-c", FREQUENCIES],
            input=THETAS.tobytes(),
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ | {"ATEN_CPU_CAPABILITY": processor},
        )
        frequencies[processor] = np.frombuffer(done.stdout, np.float32).reshape(len(THETAS), 32)
    np.savez_compressed(Path(__file__).with_name("torch_frequencies.npz"), thetas=THETAS, **frequencies)


if __name__ == "__main__":
    main()
