"""`tpfuse tune`: a small table of everything that it measures, between GPUs and on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.ranks import WORLD, own_gpus
from tpfuse.lowering.table import Table
from tpfuse.measure.points import ALONE

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(400)
COUNTS = f"{64 * WORLD},{512 * WORLD}"
COMMAND = [
    "tune", "--tp", str(WORLD), "--sequence-parallel", "--tokens", COUNTS, "--hidden", "1024", "--scheme", "none,fp8_token",
    "--intermediate", str(1024 * WORLD), "--product-tokens", COUNTS, "--trials", "3", "--no-flashinfer",
]  # fmt: skip


@own_gpus
def test_products_forms_and_sums_in_one_table(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    subprocess.run([sys.executable, "-m", "tpfuse.cli", *COMMAND, "--out", str(file)], check=True, timeout=380)
    table = Table.load(file)
    sizes = {(e.op, e.scheme, e.dtype, e.hidden, e.across) for e in table.entries}
    sums, products, across = "bfloat16", "scaled_matmul_reduce_scatter", 1024
    assert sizes == {
        ("all_reduce_add_rms_norm", "", sums, 1024, None),
        ("all_reduce_add_rms_norm_quantize", "fp8_token", sums, 1024, None),
        ("reduce_scatter_add_rms_norm_all_gather", "", sums, 1024, None),
        ("reduce_scatter_add_rms_norm_quantize_all_gather", "fp8_token", sums, 1024, None),
        ("matmul_reduce_scatter", "", sums, 1024, across), (products, "fp8_token", sums, 1024, across),
        ("matmul_reduce_scatter_add_rms_norm", "", sums, 1024, across),
        (f"{products}_add_rms_norm_quantize", "fp8_token", sums, 1024, across),
        ("all_gather_matmul", "", sums, 1024, 2 * across),
        ("all_gather_scaled_matmul", "fp8_token", "float8_e4m3fn", 1024, 2 * across),
        *((name, scheme, sums, 1024, None) for name in ("sequence_parallel", "async_tp") for scheme in ("", "fp8_token")),
    }  # fmt: skip
    for entry in table.entries:
        assert len(entry.times) == 2 and all(us > 0 for _, of in entry.times for _, us in of)
        if entry.across is not None:
            assert {"cuda:chunked", ALONE} <= dict(entry.times[0][1]).keys()


def test_attention_of_given_heads(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    given = ["tune", "--tp", "1", "--tokens", "", "--scheme", "fp8_tensor,nvfp4", "--head-dims", "64x64,192x128"]
    command = [sys.executable, "-m", "tpfuse.cli", *given, "--trials", "3", "--no-flashinfer", "--out", str(file)]
    subprocess.run(command, check=True, timeout=380)
    table = Table.load(file)
    sizes = {(e.op, e.scheme, e.world, e.across, e.hidden) for e in table.entries}
    assert sizes == {("attention_quantize", s, 1, qk, v) for s in ("fp8_tensor", "nvfp4") for qk, v in ((64, 64), (192, 128))}
    for entry in table.entries:
        assert len(entry.times) == 6 and all({"triton:flash", "triton:sdpa"} <= dict(of).keys() for _, of in entry.times)
