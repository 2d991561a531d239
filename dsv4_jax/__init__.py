"""dsv4_jax: DeepSeek-V4's KV cache for JAX, as functional arrays threaded through a jitted step.

Host, between steps: ``CacheManager`` admits requests, reserves blocks and makes a ``StepPlan``. Device, inside
``jax.jit``: ``begin`` starts a step on a donated ``Cache``, ``step.layer(i)`` gives each layer its part to write and
read in place, ``step.end()`` is the cache for the next step.

These are the names that a model or a server needs. What they are made of is in the modules: ``dsv4_jax.host`` (more
errors), ``dsv4_jax.layout``, ``dsv4_jax.spec``, ``dsv4_jax.cache``; ``ops`` are the operations on plain arrays.
"""

from dsv4_jax import ops
from dsv4_jax.cache.checker import CacheChecker
from dsv4_jax.cache.errors import CacheDamaged, StepError
from dsv4_jax.cache.layer import LayerCache
from dsv4_jax.cache.pools import Cache, init_cache
from dsv4_jax.cache.rotary import closing_rotary, token_rotary
from dsv4_jax.cache.shards import change_shard, over_shards, shard_of
from dsv4_jax.cache.step import Step, begin
from dsv4_jax.cache.transfer import apply_transfers
from dsv4_jax.cache.views import entries_view, keys_view, window_view
from dsv4_jax.host.errors import CacheError, CacheFull
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.host.sharded_plan import ShardedPlan
from dsv4_jax.host.shards import ShardedManager
from dsv4_jax.layout.capacity import capacity_plan, requests_that_fit
from dsv4_jax.layout.formats import PROFILES, CacheFormats
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.layout.schema import CacheSchema, SchemaError, compute_block_budget
from dsv4_jax.layout.transfers import TransferList, Transfers
from dsv4_jax.ops import OperandError
from dsv4_jax.ops.operands import CompressorInputs, RawRows, Rows
from dsv4_jax.parking.state import RequestState, StateError, load_state, preempt, resume, save_state, take_state
from dsv4_jax.spec.config_json import model_spec
from dsv4_jax.spec.kinds import LayerKind
from dsv4_jax.spec.model import ConfigError, ModelSpec
from dsv4_jax.spec.presets import deepseek_v4_flash, deepseek_v4_pro, tiny_spec
from dsv4_jax.spec.rotary import Rotary, apply_rotary, rotary
from dsv4_jax.version import __version__

__all__ = [
    "PROFILES",
    "Cache",
    "CacheChecker",
    "CacheDamaged",
    "CacheError",
    "CacheFormats",
    "CacheFull",
    "CacheManager",
    "CacheSchema",
    "CompressorInputs",
    "ConfigError",
    "LayerCache",
    "LayerKind",
    "ModelSpec",
    "OperandError",
    "PlanLayout",
    "RawRows",
    "RequestState",
    "Rotary",
    "Rows",
    "SchemaError",
    "ShardedManager",
    "ShardedPlan",
    "StateError",
    "Step",
    "StepError",
    "StepPlan",
    "TransferList",
    "Transfers",
    "__version__",
    "apply_rotary",
    "apply_transfers",
    "begin",
    "capacity_plan",
    "change_shard",
    "closing_rotary",
    "compute_block_budget",
    "deepseek_v4_flash",
    "deepseek_v4_pro",
    "entries_view",
    "init_cache",
    "keys_view",
    "load_state",
    "model_spec",
    "ops",
    "over_shards",
    "preempt",
    "requests_that_fit",
    "resume",
    "rotary",
    "save_state",
    "shard_of",
    "take_state",
    "tiny_spec",
    "token_rotary",
    "window_view",
]
