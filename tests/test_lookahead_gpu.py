"""Deep rings: CUDA's update against the CPU's, for windows and tails of any depth: every ring row to the bit, states of
running tails within rounding, and those that no token touches to the bit as well.
"""

import dataclasses

import jax
import numpy as np
import pytest
from op_operands import DTYPES, LAYERS, RING, STEPS, native, on_gpu, random_tail, update_operands

LOOKAHEADS = (1, 4, 5, 8)
KINDS = [("swa", None), ("csa", None), ("hca", "rows"), ("hca", "running")]


def deepened(rng, operands, kind, lookahead):
    """The same step over rings that are `lookahead` rows deeper (a CSA tail: the next multiple of four)."""
    operands = list(operands)
    window, *compressed = operands[: {"swa": 1, "csa": 3, "hca": 2}[kind]]
    depth = -(-lookahead // 4) * 4 if kind == "csa" else lookahead
    rings = 2 if kind == "csa" else 1  # overlap halves' and current halves', or the latter alone

    def deep(tail):
        if tail.ndim == 4:  # running
            states = [random_tail(rng, 128, tail.shape[3], "running", tail.shape[1]) for _ in range(1 + lookahead)]
            return np.concatenate(states, axis=2)
        layers, slots, streams, rows, width = tail.shape
        return rng.normal(size=(layers, slots, streams, rows + rings * depth, width)).astype(np.float32)

    slots, ring = window.positions.shape[1], RING + lookahead
    rows = rng.normal(size=(LAYERS, slots, ring, 512)).astype(window.window.dtype)
    positions = rng.integers(-1, 500, (LAYERS, slots, ring)).astype(np.int32)
    operands[0] = replaced(window, rows, positions)
    for place, one in enumerate(compressed, 1):
        operands[place] = replaced(one, one.pool, deep(one.tail))
    return tuple(operands)


def replaced(pair, *values):
    if hasattr(pair, "_replace"):
        return pair._replace(**dict(zip(pair._fields, values, strict=True)))
    fields = [field.name for field in dataclasses.fields(pair)]
    return dataclasses.replace(pair, **dict(zip(fields, values, strict=True)))


@pytest.fixture(autouse=True)
def _on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize(("kind", "hca_tail"), KINDS)
def test_update_over_deep_rings(rng, kind, hca_tail, lookahead, step, dtype):
    operands, attributes = update_operands(rng, kind, hca_tail, step, False, dtype, "exact")
    operands = deepened(rng, operands, kind, lookahead)
    expected = native(f"update_{kind}", *operands, **attributes)
    results = on_gpu(f"update_{kind}", *operands, **attributes)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    for name, cpu, gpu in zip(names, jax.tree.leaves(expected), jax.tree.leaves(results), strict=True):
        cpu, gpu = np.asarray(cpu), np.asarray(gpu)
        if cpu.shape[2:] == (3 * (1 + lookahead), 512):  # a running tail
            np.testing.assert_array_equal(cpu[:, :, ::3], gpu[:, :, ::3], err_msg=name)  # the largest scores
            np.testing.assert_allclose(cpu, gpu, rtol=1e-5, atol=1e-5, err_msg=name)
            kept = (cpu == operands[1].tail).all(axis=-1)
            np.testing.assert_array_equal(cpu[kept], gpu[kept], err_msg=name)
        elif cpu.ndim == 5 or kind == "swa" or cpu.dtype == np.int32 or cpu.shape[2] > RING:  # tails, and window rows
            assert cpu.tobytes() == gpu.tobytes(), f"{name}: {np.count_nonzero(cpu != gpu)} elements differ"
        else:
            np.testing.assert_allclose(cpu, gpu, rtol=0, atol=1e-5, err_msg=name)
