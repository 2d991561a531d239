"""The figures that the project holds itself to, by the name of the benchmark's case."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Target:
    """Microseconds on one NVIDIA H200."""

    at_most: float
    try_for: float

    def eased(self, factor: float) -> Target:
        """Both times longer by a factor."""
        return Target(self.at_most * factor, self.try_for * factor)


# Gathers are held to 85 % (90 %) of the speed of a device copy there, the rest to what the best published kernels take.
_WRITES_AND_GATHERS = {
    "update/csa/mixed/b1": Target(3.0, 2.4),
    "update/csa/mixed/b8": Target(3.0, 2.6),
    "update/csa/mixed/b64": Target(3.4, 3.0),
    "update/csa/mixed/b256": Target(4.5, 4.0),
    "update/hca_running/mixed/b1": Target(2.3, 1.8),
    "update/hca_running/mixed/b8": Target(2.3, 1.8),
    "update/hca_running/mixed/b64": Target(2.6, 2.0),
    "update/hca_running/mixed/b256": Target(3.2, 2.5),
    "update/hca/none/b64": Target(2.6, 1.9),
    "update/hca/all/b64": Target(10.0, 9.0),
    "gather/entries/64x1024": Target(28.8, 27.2),
    "gather/entries/256x1024": Target(115.0, 108.6),
    "prefill/csa/fp32/1x8192": Target(26.0, 22.0),
    "prefill/csa/bf16/1x8192": Target(14.5, 12.0),
    "prefill/csa/fp32/8x1024": Target(26.0, 22.0),
    "prefill/csa/bf16/8x1024": Target(14.5, 12.0),
    "prefill/hca/fp32/1x8192": Target(11.5, 9.0),
    "prefill/hca/bf16/1x8192": Target(6.5, 5.0),
    "prefill/hca/fp32/8x1024": Target(11.5, 9.0),
    "prefill/hca/bf16/8x1024": Target(6.5, 5.0),
    "step/pro/b64/one_plan": Target(135.0, 128.0),
    "step/pro/b64/planned/8_ahead": Target(190.0, 160.0),
    "host/prepare_forward/1024": Target(60.0, 50.0),
}

_CSA_64_HEADS = {1: Target(8.5, 7.0), 8: Target(9.5, 8.0), 64: Target(20.0, 15.0), 256: Target(56.0, 45.0)}
_CSA_128_HEADS = {1: Target(10.0, 8.5), 8: Target(13.5, 11.0), 64: Target(45.0, 40.0), 256: Target(158.0, 138.0)}
_OTHER_FORMATS = 1.08
_ATTEND = {
    **{f"attend/csa/h64/fp8/b{batch}": target for batch, target in _CSA_64_HEADS.items()},
    **{f"attend/csa/h128/fp8/b{batch}": target for batch, target in _CSA_128_HEADS.items()},
    **{
        f"attend/csa/h64/{formats}/b{batch}": target.eased(_OTHER_FORMATS)
        for formats in ("fp8_ds_mla", "default", "nvfp4")
        for batch, target in _CSA_64_HEADS.items()
    },
    **{f"attend/csa/h{heads}/fp8/b{n}": target for heads in (8, 16, 32) for n, target in _CSA_64_HEADS.items()},
    "attend/csa/h64/fp8/64x4/lookahead4": Target(58.0, _CSA_64_HEADS[256].try_for),
    "attend/csa/h64/fp8/1x2048": Target(430.0, 340.0),
    "attend/hca/h64/fp8/b1": Target(12.0, 9.0),
    "attend/hca/h64/fp8/b8": Target(25.0, 19.0),
    "attend/hca/h64/fp8/b64": Target(150.0, 125.0),
}

_INDEX_TOPK = {
    "index_topk/fp8/16384/b1": Target(8.5, 7.0),
    "index_topk/fp8/16384/b8": Target(12.5, 10.0),
    "index_topk/fp8/16384/b64": Target(45.0, 40.0),
    "index_topk/fp8/16384/b256": Target(152.0, 145.0),
    "index_topk/mxfp4/16384/b1": Target(8.5, 7.0),
    "index_topk/mxfp4/16384/b8": Target(11.0, 8.5),
    "index_topk/mxfp4/16384/b64": Target(32.0, 26.0),
    "index_topk/mxfp4/16384/b256": Target(105.0, 85.0),
    "index_topk/nvfp4/16384/b1": Target(8.5, 7.0),
    "index_topk/nvfp4/16384/b8": Target(12.0, 9.5),
    "index_topk/nvfp4/16384/b64": Target(40.0, 32.0),
    "index_topk/nvfp4/16384/b256": Target(125.0, 108.0),
    "index_topk/fp8/262144/b1": Target(19.0, 13.0),
    "index_topk/fp8/262144/b8": Target(84.0, 74.0),
    "index_topk/mxfp4/262144/b1": Target(14.0, 10.0),
    "index_topk/mxfp4/262144/b8": Target(55.0, 48.0),
    "index_topk/mxfp4/16384/1x2048": Target(750.0, 580.0),
}

_DECODE_STEP = {
    "step/flash/b1": Target(650.0, 650.0),
    "step/flash/b8": Target(750.0, 600.0),
    "step/flash/b64": Target(1900.0, 1550.0),
}

TARGETS: Mapping[str, Target] = MappingProxyType({**_WRITES_AND_GATHERS, **_ATTEND, **_INDEX_TOPK, **_DECODE_STEP})
"""Every case that is held to something."""
