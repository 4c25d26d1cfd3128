"""The CUDA C++ kernels compile for sm_90, fit their registers and spill nothing, wherever nvcc is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tpfuse.kernels import arrive, driver
from tpfuse.kernels.calls import NormCall
from tpfuse.kernels.cuda_norm import BlockPlan, literals, macros_of, sources_of
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


SUMS = [("sharded", 8192, 2), ("reduce", 8192, 2), ("reduce", 16384, 4), ("reduce", 8, 8)]
FLAGS: dict[str, dict[str, Any]] = {
    "one_shot": {}, "sharded": {"NORM": False, "OWN_NORM": False, "GATHER": True}, "reduce": {"NORM": False, "OWN_NORM": True},
}  # fmt: skip


def registers(tmp_path: Path, sources: tuple[str, ...], macros: frozenset[tuple[str, str]]) -> tuple[list[int], str]:
    """What each kernel uses, and what the compiler said."""
    source = tmp_path / "kernel.cu"
    source.write_text(driver.source_text(sources))
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v", "-o", "/dev/null"]
    done = subprocess.run([*command, *driver.defines(dict(macros)), str(source)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [int(line.split("Used ")[1].split()[0]) for line in done.stderr.splitlines() if "Used " in line], done.stderr


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("scheme, layout, hidden, world, more", KINDS)
def test_compiles(tmp_path: Path, name: str, scheme: str, layout: str, hidden: int, world: int, more: dict[str, Any]) -> None:
    flags = FLAGS[name] | ({"NORM": not scheme} if name == "sharded" else {})
    call = a_call(NormCall if name == "one_shot" else ShardCall, scheme, layout, hidden, more)
    plan = BlockPlan.of(hidden // 8)
    used, said = registers(tmp_path, sources_of(name), macros_of(call, world - 1, world, plan, **flags))
    assert max(used) * plan.threads * plan.resident <= 65536
    if world == 2:
        assert said.count(" 0 bytes spill stores") == said.count("spill stores") > 0


@pytest.mark.parametrize("name, hidden, world", SUMS)
def test_the_sum_alone_compiles(tmp_path: Path, name: str, hidden: int, world: int) -> None:
    x = torch.empty(2, hidden, dtype=torch.float16)
    call = ShardCall("matmul_reduce_scatter", x, (False, False, False, True), None, 0.0, 0.0, "cast_first", group="tp")
    plan = BlockPlan.of(hidden // 8)
    flags = {"NORM": False, "OWN_NORM": False} | ({"GATHER": False} if name == "sharded" else {})
    used, said = registers(tmp_path, sources_of(name), macros_of(call, 0, world, plan, **flags))
    assert max(used) * plan.threads * plan.resident <= 65536
    assert said.count(" 0 bytes spill stores") == said.count("spill stores") > 0


@pytest.mark.parametrize("world", [2, 8])
def test_waits_fit_beside_a_product(tmp_path: Path, world: int) -> None:
    """A block of a product may leave a multiprocessor no more than 1,024 registers: a warp of 32 each."""
    names = ("push_rows", "finish", "wait_full", "wait_done")
    used, said = registers(tmp_path, arrive.SOURCES, literals({"RANK": world - 1, "WORLD": world}))
    order = [line.split("'")[1] for line in said.splitlines() if "Compiling entry" in line]
    assert sorted(order) == sorted(names)
    assert all(count <= 32 for name, count in zip(order, used, strict=True) if name != "push_rows")
