"""The cache's operations on arrays, each one native FFI call; ``dsv4_jax.reference`` has the same in plain jnp."""

from dsv4_jax.native.call import OperandError
from dsv4_jax.ops.append.api import append_tail, append_window
from dsv4_jax.ops.begin.api import begin_step
from dsv4_jax.ops.compress.api import compress
from dsv4_jax.ops.flush.api import flush
from dsv4_jax.ops.gather.api import gather_all_entries, gather_entries, gather_window
from dsv4_jax.ops.quantize.api import dequantize, quantize
from dsv4_jax.ops.rotate.api import rotate
from dsv4_jax.ops.transfer.api import transfer
from dsv4_jax.ops.update.api import normalize, update_csa, update_hca, update_swa

__all__ = [
    "OperandError",
    "append_tail",
    "append_window",
    "begin_step",
    "compress",
    "dequantize",
    "flush",
    "gather_all_entries",
    "gather_entries",
    "gather_window",
    "normalize",
    "quantize",
    "rotate",
    "transfer",
    "update_csa",
    "update_hca",
    "update_swa",
]
