"""What the kernels are compiled for: the module says it, and a build without CUDA says nothing."""

import re

import dsv4_jax_native


def test_the_module_says_which_architectures_it_was_built_for():
    architectures = dsv4_jax_native.cuda_architectures()
    assert isinstance(architectures, tuple)
    assert bool(architectures) == bool(dsv4_jax_native.cuda_version())
    assert all(re.fullmatch(r"\d+[af]?(-virtual)?", architecture) for architecture in architectures)
    assert len(set(architectures)) == len(architectures)
