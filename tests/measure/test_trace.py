"""Layers with a sharded residual, as they are lowered for two H100s: products with their collectives, and nothing between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tpfuse
from tpfuse.config import PASSES, Config
from tpfuse.measure.forms import all_reduced, sequence_parallel
from tpfuse.measure.linears import OWN
from tpfuse.measure.stack import Shape, Stack
from tpfuse.measure.trace import difference, kind, overlapped
from tpfuse.target import Target

H100 = Target("cuda", 90, 2, True, frozenset({"reference", "triton", "cuda", "torch", "nccl"}))
TINY = {"llama": Shape(256, 512, 4, 4), "gemma": Shape(256, 512, 4, 4, gemma=True)}
MOVES = ("getitem", "view", "permute", "split", "reshape", "sym_size")  # no kernels
ACTIVATION = {"neg", "exp", "add", "div", "mul", "tanh", "clamp_min", "clamp_max", "convert_element_type"}  # one loop


def of_the_middle_layer(name: str, scheme: str, form: str, table: Path) -> list[str]:
    """The operators that are no views, in order."""
    torch.compiler.reset()  # one function is compiled for each case
    group = dist.group.WORLD
    stack = Stack(TINY[name], 3, 2, torch.bfloat16, "cpu", scheme)
    written = {"all_reduced": all_reduced, "sequence_parallel": sequence_parallel}[form](group)  # type: ignore[arg-type]
    config = Config(passes=PASSES, table=str(table), max_tokens=2048)
    report = tpfuse.explain(lambda x: stack(x, None, 1, written), torch.randn(64, 256).bfloat16(), config=config, target=H100)
    (result,) = report.results
    names = [line.operator for line in result.after if (line.site or "").startswith("stack.layers.1")]
    return [name.split(".")[1] for name in names if not any(move in name for move in MOVES)]


@pytest.mark.parametrize(
    ("form", "scheme"),
    [*(("all_reduced", s) for s in ("", "fp8_tensor", *OWN)), *(("sequence_parallel", s) for s in ("", "fp8_tensor"))],
)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_nothing_is_left_between_products(name: str, scheme: str, form: str, group: str, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    overlapped(2, "chunked", "chunked").save(table)
    operators = of_the_middle_layer(name, scheme, form, table)
    line = "rms_norm_add_rms_norm" if name == "gemma" else "add_rms_norm"
    product, quantised = ("scaled_matmul", "_quantize") if scheme else ("matmul", "")
    gather, scatter = f"all_gather_{product}", f"{product}_reduce_scatter_{line}{quantised}"
    attention = "attention_quantize" if scheme else "_scaled_dot_product_flash_attention_for_cpu"
    feed = ["act_and_mul_quantize"] if scheme in OWN else []
    assert [o for o in operators if o not in ACTIVATION] == [gather, attention, scatter, gather, *feed, scatter]
    second = len(operators) - operators[::-1].index(gather)
    assert not ACTIVATION & set(operators[:second]) and bool(ACTIVATION & set(operators)) != bool(feed)


def test_a_layer_is_the_difference_of_two_stacks() -> None:
    short = {"nvjet_tst_128": [10.0] * 9, "triton_red_fused_0": [3.0], "Memcpy DtoD": [1.0] * 4}
    long = {"nvjet_tst_128": [10.0] * 17, "triton_red_fused_0": [3.0], "Memcpy DtoD": [1.0] * 8, "reduce": [2.0, 4.0]}
    assert difference(short, long, 2) == [
        {"kernel": "nvjet_tst_128", "kind": "product", "count": 4.0, "us": 40.0},
        {"kernel": "reduce", "kind": "tpfuse", "count": 1.0, "us": 3.0},
        {"kernel": "Memcpy DtoD", "kind": "copy", "count": 2.0, "us": 2.0},
    ]


def test_kinds() -> None:
    names = {
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "NCCL",
        "triton_poi_fused_mul_silu_2": "Inductor",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention", "attention_kernel": "tpfuse",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "product", "Memset (Device)": "copy", "void at::native::elementwise_kernel<>": "other",
    }  # fmt: skip
    assert {name: kind(name) for name in names} == names
