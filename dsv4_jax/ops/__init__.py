"""The cache's operations on arrays, each one native FFI call; ``dsv4_jax.reference`` has the same in plain jnp."""

from dsv4_jax.ops._call import OperandError
from dsv4_jax.ops.append import append_tail, append_window
from dsv4_jax.ops.begin import begin_step
from dsv4_jax.ops.compress import compress
from dsv4_jax.ops.flush import flush
from dsv4_jax.ops.gather import gather_all_entries, gather_entries, gather_window
from dsv4_jax.ops.quantize import dequantize, quantize
from dsv4_jax.ops.rotate import rotate
from dsv4_jax.ops.update import normalize, update_csa, update_hca, update_swa

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
    "update_csa",
    "update_hca",
    "update_swa",
]
