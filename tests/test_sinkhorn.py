"""Sinkhorn's normalization, as a loop and as a GPU's kernel, and what a GPU is given of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for_h200

from dsv4_jax.deepseek_v4.sinkhorn import sinkhorn, sinkhorn_by_kernel, sinkhorn_looped


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("normalize", [sinkhorn, sinkhorn_looped, sinkhorn_by_kernel])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn(iterations, normalize, tokens, device, rng):
    """Against float64, one matrix and one line of it at a time."""
    matrices = np.exp(rng.standard_normal((tokens, 4, 4)))
    expected, eps = matrices.copy(), 1e-6
    for iteration in range(iterations):
        for matrix in expected:
            if iteration:
                for row in range(4):
                    matrix[row] /= matrix[row].sum() + eps
            for column in range(4):
                matrix[:, column] /= matrix[:, column].sum() + eps
    if normalize is sinkhorn_by_kernel:
        normalize = functools.partial(normalize, interpret=device.platform == "cpu")
    made = np.asarray(normalize(jnp.asarray(matrices, jnp.float32), iterations=iterations, eps=eps))
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-6)
    if iterations == 20:
        np.testing.assert_allclose(made.sum(axis=1), 1, atol=1e-3)
        np.testing.assert_allclose(made.sum(axis=2), 1, atol=1e-3)


def test_a_gpu_is_given_one_kernel(tmp_path):
    run = functools.partial(sinkhorn, iterations=20, eps=1e-6)
    gpu = compile_for_h200(run, jax.ShapeDtypeStruct((64, 4, 4), jnp.float32), dump=tmp_path)
    assert gpu.compiled.memory_analysis().temp_size_in_bytes == 0
    assert len(gpu.thunks) == 1
