"""Compile for an H200 on a machine without one, and look into what was compiled.

Needs no driver, only the CUDA plugin of the installed jax and a native module built with CUDA; scripts/test.sh
provides both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.tools.bench.step import thunk_sequence

# The versions decide what is captured into CUDA graphs: without the driver's nothing is, and without that of the
# toolkit, which a process with a GPU knows, calls that XLA wraps in dynamic-slice fusions are not.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 driver_version: "12.9.0"
  runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 patch: 0 } device_description_str: "NVIDIA H200"
"""

# Autotuning would need the device.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class GpuProgram:
    """A function compiled for the H200: the executable, and its thunks as (kind, inside a CUDA graph)."""

    compiled: jax.stages.Compiled
    thunks: tuple[tuple[str, bool], ...]

    @property
    def graphs(self) -> int:
        """How many CUDA graphs the program launches."""
        return sum(kind == "kCommandBuffer" for kind, _ in self.thunks)

    def custom_calls(self, *, captured: bool) -> int:
        """How many FFI calls are inside (`captured`) or outside CUDA graphs."""
        return sum(kind == "kCustomCall" and inside == captured for kind, inside in self.thunks)

    @property
    def wrapped_calls(self) -> int:
        """How many calls XLA wraps in fusions that read slices of other arrays: each is a nested call for the host."""
        return sum(kind.startswith("kDynamicSlice") for kind, _ in self.thunks)

    def readers(self, argument: str) -> list[str]:
        """The instructions that read an argument, named as ``plan.packed``, where the caller put it."""
        text = self.compiled.as_text()
        (name,) = re.findall(rf'%?(\S+) = \S+ parameter\(\d+\),[^\n]*op_name="{re.escape(argument)}"', text)
        return [line for line in text.splitlines() if re.search(rf"[(, ]%?{re.escape(name)}[,)]", line)]


def h200_mesh(devices: int, axis: str) -> Mesh:
    """That many H200s of one host. Skips the test where the CUDA plugin or the native module's CUDA part is missing."""
    from dsv4_jax.native.registration import REGISTERED

    pytest.importorskip("jax_plugins", reason="no CUDA plugin installed")
    if "CUDA" not in REGISTERED:
        pytest.skip("the native module was built without CUDA")
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x{devices}x1")
    return topologies.make_mesh(topology, (devices,), (axis,))


def compile_for_h200(fn, *args: Any, dump: Path, donate_argnums: int | Sequence[int] = ()) -> GpuProgram:
    """Compile `fn(*args)` for one H200; `args` are pytrees of arrays or jax.ShapeDtypeStruct, `dump` an empty folder.

    Skips the test as `h200_mesh`.
    """
    mesh = h200_mesh(1, "x")
    here = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a), sharding=here), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it for the device
        traced = jax.jit(fn, donate_argnums=donate_argnums).trace(*shapes)
    return compile_traced(traced, dump)


def compile_traced(traced: Any, dump: Path) -> GpuProgram:
    """Compile a traced function whose arguments are on a `h200_mesh`."""
    lowered = traced.lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options=OPTIONS | {"xla_dump_to": str(dump)})
    return GpuProgram(compiled, _read_thunks(dump))


def _read_thunks(dump: Path) -> tuple[tuple[str, bool], ...]:
    text = thunk_sequence(dump)
    assert text is not None, f"XLA dumped no thunk sequence into {dump}"
    thunks, graph_indent = [], None
    for indent, kind in re.findall(r"^( *)\d+: (k\w+)", text, re.MULTILINE):
        if graph_indent is not None and len(indent) <= graph_indent:
            graph_indent = None
        thunks.append((kind, graph_indent is not None))
        if kind == "kCommandBuffer":
            graph_indent = len(indent)
    return tuple(thunks)


def assert_in_place(compiled: jax.stages.Compiled, pools: Any, *, temporary_bytes: int) -> None:
    """Assert that `compiled` updates the donated pytree `pools` where it lies.

    Equal pointers would not prove it, since XLA can copy a pool out and back. So: the aliased outputs are at least
    as large as the pools, temporary memory stays within `temporary_bytes`, and no copy has the shape of a pool.
    """
    leaves = jax.tree.leaves(pools)
    memory = compiled.memory_analysis()
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert memory.alias_size_in_bytes >= expected, f"{memory.alias_size_in_bytes} bytes aliased of {expected}"
    assert memory.temp_size_in_bytes <= temporary_bytes, f"{memory.temp_size_in_bytes} bytes of temporaries"
    copied = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* copy(?:-start)?\(", compiled.as_text())
    shapes = {",".join(map(str, leaf.shape)) for leaf in leaves}
    assert not shapes & set(copied), f"pools copied whole: {shapes & set(copied)}"
