"""The CUDA C++ kernels compile for sm_90, fit their registers and spill nothing, wherever nvcc is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tpfuse.kernels import driver
from tpfuse.kernels.calls import NormCall
from tpfuse.kernels.cuda_norm import BlockPlan, macros_of, sources_of
from tpfuse.kernels.cuda_sharded import ShardCall

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
KINDS = [
    ("", "", 4096, 2, {}), ("fp8_tensor", "row", 8192, 2, {}), ("fp8_token", "row", 5120, 2, {"weight_bias": 1.0}),
    ("fp8_group128", "col+tma", 8192, 2, {}), ("fp8_group64", "col+tma+ue8m0_packed", 5120, 4, {}),
    ("nvfp4", "swizzled_128x4", 8192, 2, {}), ("", "", 2056, 3, {"sandwich": True, "eps2": 1e-6}),
]  # fmt: skip


def a_call(kind: Any, scheme: str, layout: str, hidden: int, more: dict[str, Any]) -> Any:
    x = torch.empty(2, hidden, dtype=torch.bfloat16)
    scale = torch.ones(1) if scheme.startswith(("fp8_tensor", "nvfp4")) else None
    given = {"eps": 1e-6, "weight_bias": 0.0, "rounding": "cast_first", **more}
    quantised = bool(scheme)
    return kind(
        "all_reduce_add_rms_norm", x, (quantised, quantised, not quantised, True), x[0], residual=x, scale=scale,
        weight2=x[0] if "sandwich" in more else None, scheme=scheme, layout=layout, **given,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["one_shot", "sharded"])
@pytest.mark.parametrize("scheme, layout, hidden, world, more", KINDS)
def test_compiles(tmp_path: Path, name: str, scheme: str, layout: str, hidden: int, world: int, more: dict[str, Any]) -> None:
    flags = {"NORM": not scheme, "OWN_NORM": False, "GATHER": True} if name == "sharded" else {}
    call = a_call(ShardCall if name == "sharded" else NormCall, scheme, layout, hidden, more)
    plan = BlockPlan.of(hidden // 8)
    macros = macros_of(call, world - 1, world, plan, **flags)
    source = tmp_path / "kernel.cu"
    source.write_text(driver.source_text(sources_of(name)))
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v", "-o", "/dev/null"]
    done = subprocess.run([*command, *driver.defines(dict(macros)), str(source)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    used = [int(line.split("Used ")[1].split()[0]) for line in done.stderr.splitlines() if "Used " in line]
    assert max(used) * plan.threads * plan.resident <= 65536
    if world == 2:
        assert done.stderr.count(" 0 bytes spill stores") == done.stderr.count("spill stores") > 0
