"""The cache's operations on arrays.

Each takes ``implementation``: "native", one FFI call that runs on CPU or GPU, or "reference", the same in plain jnp on
any platform. The two store the same bytes wherever the fp32 rows are equal; pooled values agree within rounding.
"""

from dsv4_jax.ops.append.api import append_tail, append_window
from dsv4_jax.ops.attend.api import attend_all_entries, attend_entries, attend_window
from dsv4_jax.ops.begin.api import begin_step
from dsv4_jax.ops.checks import Implementation, OperandError
from dsv4_jax.ops.compress.api import compress
from dsv4_jax.ops.compress.reference import hadamard_transform
from dsv4_jax.ops.displaced.api import save_displaced
from dsv4_jax.ops.flush.api import flush
from dsv4_jax.ops.gather.api import gather_all_entries, gather_entries, gather_window
from dsv4_jax.ops.index.api import index_topk
from dsv4_jax.ops.quantize.api import dequantize, quantize
from dsv4_jax.ops.rotate.api import rotate
from dsv4_jax.ops.transfer.api import transfer
from dsv4_jax.ops.update.api import normalize, update_csa, update_hca, update_swa

__all__ = [
    "Implementation",
    "OperandError",
    "append_tail",
    "append_window",
    "attend_all_entries",
    "attend_entries",
    "attend_window",
    "begin_step",
    "compress",
    "dequantize",
    "flush",
    "gather_all_entries",
    "gather_entries",
    "gather_window",
    "hadamard_transform",
    "index_topk",
    "normalize",
    "quantize",
    "rotate",
    "save_displaced",
    "transfer",
    "update_csa",
    "update_hca",
    "update_swa",
]
