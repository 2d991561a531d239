"""Managers for tests, and what they remember."""

import copy
import dataclasses

import numpy as np

from dsv4_jax.host.manager import CacheManager
from dsv4_jax.layout.formats import CacheFormats
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import LayerKind
from dsv4_jax.spec.presets import tiny_spec

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA


def make_manager(*kinds, hca_tail="rows", token_buckets=(8, 64, 512), wipe=False, **sizes) -> CacheManager:
    """A manager for a model of one layer of each kind given; CSA and HCA without any."""
    spec, kinds = tiny_spec(), kinds or (CSA, HCA)
    layers = [next(layer for layer in spec.layers if layer.kind == kind) for kind in kinds]
    spec = dataclasses.replace(spec, layers=tuple(layers))
    sizes = {"slots": 4, "blocks": 40, "max_context": 1024} | sizes
    schema = CacheSchema(spec, CacheFormats(hca_tail=hca_tail), **sizes)
    return CacheManager(schema, token_buckets=token_buckets, wipe=wipe)


def state(thing) -> dict:
    """Everything a manager remembers, as values that compare by content."""
    values = {}
    for name, value in vars(thing).items():
        if type(value).__module__.startswith("dsv4_jax.host"):
            values[name] = state(value)
        else:
            values[name] = (value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else copy.copy(value)
    return values


def grow(manager: CacheManager, request: int, length: int) -> None:
    """Prepares steps until the request has `length` tokens."""
    while manager.length(request) < length:
        manager.prepare_forward({request: min(length - manager.length(request), 500)})
