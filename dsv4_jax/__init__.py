"""dsv4_jax: DeepSeek-V4's KV cache for JAX, as functional arrays threaded through a jitted step.

Host, between steps: ``CacheManager`` admits requests, reserves blocks and makes a ``StepPlan``. Device, inside
``jax.jit``: ``begin_step`` and one ``LayerCache`` per layer read and write a donated ``Cache`` in place.
"""

from dsv4_jax.cache.layer import LayerCache, WrongLayerKind
from dsv4_jax.cache.pools import Cache, init_cache
from dsv4_jax.cache.step import begin_step
from dsv4_jax.cache.transfer import apply_transfers
from dsv4_jax.cache.views import Field, PoolView, entries_view, keys_view, window_view
from dsv4_jax.host.errors import (
    CacheError,
    CacheFull,
    CannotTruncate,
    ContextExceeded,
    InvalidStep,
    StalePlan,
    StepTooLarge,
    UnknownRequest,
)
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.layout.capacity import CapacityPlan, capacity_plan, requests_that_fit
from dsv4_jax.layout.formats import PROFILES, CacheFormats, FormatError, VectorFormat
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.layout.schema import CacheSchema, LayerCacheSchema, SchemaError, compute_block_budget
from dsv4_jax.layout.transfers import TransferList, Transfers
from dsv4_jax.ops import OperandError
from dsv4_jax.ops.operands import CompressorInputs, RawRows, Rows
from dsv4_jax.spec.config_json import model_spec
from dsv4_jax.spec.kinds import LayerKind
from dsv4_jax.spec.model import ConfigError, LayerSpec, ModelSpec, RopeSpec
from dsv4_jax.spec.presets import deepseek_v4_flash, deepseek_v4_pro, tiny_spec
from dsv4_jax.spec.rotary import Rotary, apply_rotary, closing_rotary, rotary, token_rotary

__all__ = [
    "PROFILES",
    "Cache",
    "CacheError",
    "CacheFormats",
    "CacheFull",
    "CacheManager",
    "CacheSchema",
    "CannotTruncate",
    "CapacityPlan",
    "CompressorInputs",
    "ConfigError",
    "ContextExceeded",
    "Field",
    "FormatError",
    "InvalidStep",
    "LayerCache",
    "LayerCacheSchema",
    "LayerKind",
    "LayerSpec",
    "ModelSpec",
    "OperandError",
    "PlanLayout",
    "PoolView",
    "RawRows",
    "RopeSpec",
    "Rotary",
    "Rows",
    "SchemaError",
    "StalePlan",
    "StepPlan",
    "StepTooLarge",
    "TransferList",
    "Transfers",
    "UnknownRequest",
    "VectorFormat",
    "WrongLayerKind",
    "apply_rotary",
    "apply_transfers",
    "begin_step",
    "capacity_plan",
    "closing_rotary",
    "compute_block_budget",
    "deepseek_v4_flash",
    "deepseek_v4_pro",
    "entries_view",
    "init_cache",
    "keys_view",
    "model_spec",
    "requests_that_fit",
    "rotary",
    "tiny_spec",
    "token_rotary",
    "window_view",
]
