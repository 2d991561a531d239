"""Pools of rows as a cache has them: quantized normal numbers, no page twice in a request, and cheap to make.

What kernels take depends on what they read: products of noise bytes as scales and codes differ by hundreds of binades.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dsv4_jax import ops
from dsv4_jax.layout.formats import VectorFormat

_WINDOWS = 64


def filled_pool(format: VectorFormat, rows: int, layers: int, table: NDArray[np.int32]) -> jax.Array:
    """A pool whose blocks are shared out by a table: each slot's pages differ, those of other slots and layers recur.

    Args:
      format: how rows are stored.
      rows: of a page.
      layers: of the pool.
      table: [slots, blocks of a slot], every block of the pool once.

    Returns:
      [layers, blocks, *page of `rows` rows].
    """
    slots, blocks = table.shape
    order = np.empty(table.size, np.int32)
    order[table] = np.arange(blocks) + 5 * np.arange(slots)[:, None]
    return _repeated(stored_pages(format, rows, blocks), order, layers)


def filled_window(format: VectorFormat, ring: int, layers: int, slots: int) -> jax.Array:
    """The window rows of all slots, [layers, slots, *page of `ring` rows]; those of every 64th slot are alike."""
    return _repeated(stored_pages(format, ring, min(slots, _WINDOWS)), np.arange(slots, dtype=np.int32), layers)


@functools.lru_cache(maxsize=8)
def stored_pages(format: VectorFormat, rows: int, count: int) -> NDArray[Any]:
    """So many pages of normal numbers, [count, *page of `rows` rows], on the host."""
    values = np.random.default_rng(0).standard_normal((count * rows, format.width), np.float32)
    page = np.asarray(ops.quantize(jnp.asarray(values), format=format))
    if not format.quantized:
        return page.reshape(count, rows, format.width)
    # One page of all rows: data of all, then scales of all.
    data, scales, _ = np.split(page, [count * rows * format.data_bytes, count * rows * format.row_bytes])
    padding = np.zeros((count, format.page_bytes(rows) - rows * format.row_bytes), np.uint8)
    return np.concatenate([data.reshape(count, -1), scales.reshape(count, -1), padding], axis=1)


@functools.partial(jax.jit, static_argnums=2)
def _repeated(pages: jax.Array, order: jax.Array, layers: int) -> jax.Array:
    """Page ``(order[i] + layer) % count`` at place i of every layer."""
    which = (order + jnp.arange(layers, dtype=jnp.int32)[:, None]) % len(pages)
    return pages.at[which.ravel()].get(mode="promise_in_bounds").reshape(layers, len(order), *pages.shape[1:])
