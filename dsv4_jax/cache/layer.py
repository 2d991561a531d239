"""LayerCache: what an attention layer is given to read and write its part of the cache, by ``Step.layer``.

Functional throughout: a method that writes or reads the cache returns a new handle, and ``layer.step`` goes on to the
next layer. Making a handle allocates nothing.
"""

import dataclasses

import jax

from dsv4_jax.cache.layer_reads import LayerReads
from dsv4_jax.cache.layer_writes import LayerWrites


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LayerCache(LayerWrites, LayerReads):
    """One layer's part of the cache during one step; ``Step.layer`` makes it. A pytree.

    Write it first (``update``), then read (``index_topk``, ``attend``, or the gathers ``window``, ``entries``, …), and
    go on with what each call returns. ``LayerState`` has its attributes.
    """
