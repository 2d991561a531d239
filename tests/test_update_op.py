"""update_swa, update_csa and update_hca three ways: the CPU handler against the jnp definition, CUDA against the CPU.

Pooled values agree within fp32 rounding; everything else to the bit.
"""

import jax
import ml_dtypes
import numpy as np
import pytest
from op_operands import (
    CROWDED_STEPS,
    DTYPES,
    KINDS,
    OTHER,
    STEPS,
    assert_same,
    by_definition,
    native,
    on_gpu,
    update_operands,
)

EACH_STEP = pytest.mark.parametrize("step", STEPS)
EACH_PROFILE = pytest.mark.parametrize("profile", ["exact", "default", "flashmla", "compact"])


def update_two_ways(other, rng, kind, *settings):
    """The results of update_<kind> by the CPU handler, and by the other way."""
    operands, attributes = update_operands(rng, kind, *settings)
    return [run(f"update_{kind}", *operands, **attributes) for run in (native, other)]


# Kernels are built for each, the definition is one: on the CPU a step has one of them.
RAW_AND_DTYPE = pytest.mark.parametrize(
    ("other", "step", "raw", "dtype"),
    [
        (by_definition, "prefill", True, ml_dtypes.bfloat16),
        (by_definition, "decode", False, np.float32),
        (by_definition, "decode of several tokens", True, np.float32),
    ]
    + [
        pytest.param(on_gpu, step, raw, dtype, marks=pytest.mark.gpu)
        for step in STEPS
        for raw in (False, True)
        for dtype in (np.float32, ml_dtypes.bfloat16)
    ],
)


@RAW_AND_DTYPE
@pytest.mark.parametrize(("kind", "hca_tail"), KINDS)
def test_update(other, rng, kind, hca_tail, step, raw, dtype):
    """One op for all writes of a layer, in fp32, where values that differ in their last bit are stored as such.

    test_chunking.py compares the other formats with separate ops, to the bit.
    """
    left, right = update_two_ways(other, rng, kind, hca_tail, step, raw, dtype, "exact")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), left, right)


@OTHER
@EACH_STEP
@EACH_PROFILE
def test_update_of_finished_rows_to_the_bit(other, rng, step, profile):
    """Nothing but window rows, and nothing to compute but codes."""
    dtype = np.float32 if step == "decode" else ml_dtypes.bfloat16
    assert_same(*update_two_ways(other, rng, "swa", None, step, False, dtype, profile))


@pytest.mark.gpu
@DTYPES
@EACH_STEP
@EACH_PROFILE
def test_update_of_raw_rows_to_the_bit(rng, step, dtype, profile):
    """The definition's norm may differ in a last bit, that of the two handlers may not."""
    assert_same(*update_two_ways(on_gpu, rng, "swa", None, step, True, dtype, profile))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("step", CROWDED_STEPS)
@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_update_of_a_crowded_step(rng, kind, step, dtype):
    operands, attributes = update_operands(rng, kind, "rows", step, False, dtype, "exact")
    expected = native(f"update_{kind}", *operands, **attributes)
    results = on_gpu(f"update_{kind}", *operands, **attributes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), expected, results)
