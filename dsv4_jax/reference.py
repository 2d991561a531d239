"""Every cache operation in plain jnp: the specification that runs.

Same names, arguments and results as `dsv4_jax.ops`, on any platform, for a reader and for tests. Stored bytes are the
native kernels' bytes wherever the fp32 rows are equal; pooled values agree within rounding.
"""

from dsv4_jax.ops.append.reference import append_tail, append_window
from dsv4_jax.ops.begin.reference import begin_step
from dsv4_jax.ops.compress.reference import compress, hadamard_transform
from dsv4_jax.ops.flush.reference import flush
from dsv4_jax.ops.gather.reference import gather_all_entries, gather_entries, gather_window
from dsv4_jax.ops.quantize.reference import dequantize, quantize
from dsv4_jax.ops.rotate.reference import rotate
from dsv4_jax.ops.transfer.reference import transfer
from dsv4_jax.ops.update.reference import normalize, update_csa, update_hca, update_swa

__all__ = [
    "append_tail",
    "append_window",
    "begin_step",
    "compress",
    "dequantize",
    "flush",
    "gather_all_entries",
    "gather_entries",
    "gather_window",
    "hadamard_transform",
    "normalize",
    "quantize",
    "rotate",
    "transfer",
    "update_csa",
    "update_hca",
    "update_swa",
]
