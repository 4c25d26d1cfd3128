"""What a measured entry says for a range; what lowering makes of it, on constructed targets."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tpfuse.ir import fused
from tpfuse.ir.op import Kernel
from tpfuse.lowering.choice import choose
from tpfuse.lowering.select import EVERY, Pick, pick
from tpfuse.lowering.table import Entry, Table
from tpfuse.report import Decline
from tpfuse.target import UNBOUNDED, Range, Target

ONE, TWO = "triton:one_shot", "triton:two_shot"
ROW = 4096 * 2
MEASURED = ((64 * ROW, ONE), (512 * ROW, TWO), (4096 * ROW, "torch:two_shot"), (None, "unfused"))
OP = fused.all_reduce_add_rms_norm
H100 = Target("cuda", 90, 2, True, backends=frozenset({"reference", "triton", "torch", "nccl"}))


def entry(*steps: tuple[int | None, str], hidden: int | None = 4096, **others: Any) -> Entry:
    return Entry(OP.name, "bfloat16", 2, steps or MEASURED, hidden=hidden, **others)


def arguments(hidden: int = 4096, dtype: torch.dtype = torch.bfloat16, **others: Any) -> dict[str, Any]:
    x = torch.empty(4, hidden, dtype=dtype, device="meta")
    return {"x": x, "residual": x, "weight": x[0], "bias": None, "alpha": 1.0, "rounding": "cast_first", **others}


def chosen(limits: Range, *steps: tuple[int | None, str], preference: str = "auto", target: Target = H100, **args: Any) -> Any:
    return pick(OP, arguments(**args), target, preference, Table("", {}, (entry(*steps),)), limits)


def test_steps_within_a_range():
    assert entry().within(1, 64 * ROW) == [(64 * ROW, ONE)]
    assert entry().within(64 * ROW + 1, 600 * ROW) == [(512 * ROW, TWO), (600 * ROW, "torch:two_shot")]
    assert entry().within(5000 * ROW, None) == [(None, "unfused")]


@pytest.mark.parametrize(
    ("start", "end", "name"),
    [
        (1, 64, ONE),
        (65, 512, TWO),
        (1, 512, f"{ONE}<={64 * ROW},{TWO}"),  # a graph holds both and chooses when it runs
        (100, 4096, f"{TWO}<={512 * ROW},torch:two_shot"),
        (513, 4096, "torch:two_shot"),
        (3000, 8192, "unfused"),  # one doubling against less than half of one
        (3000, 4200, "torch:two_shot"),
    ],
)
def test_the_choice_of_a_range(start: int, end: int, name: str):
    found = chosen(Range(start, end))
    if name == "unfused":
        assert isinstance(found, Decline) and found.code == "threshold" and "measured at hidden 4096" in found.detail
    else:
        assert isinstance(found, Pick) and found.name == name and found.why.startswith("measured at hidden 4096")


def test_a_range_without_end():
    assert chosen(Range(3000, UNBOUNDED)).code == "threshold"
    assert chosen(EVERY).name == f"{ONE}<={64 * ROW},{TWO}<={512 * ROW},torch:two_shot"
    assert chosen(EVERY, (None, TWO)).name == TWO


def test_what_is_left_out_is_filled_by_its_neighbour():
    steps = entry((8 * ROW, "unfused"), (64 * ROW, "nccl"), (512 * ROW, "flashinfer:one_shot"), (None, ONE))
    assert choose(steps, ROW, None).steps == ((64 * ROW, "nccl"), (512 * ROW, "flashinfer:one_shot"), (None, ONE))
    assert choose(steps, ROW, None, lambda k: k != "flashinfer:one_shot").steps == ((512 * ROW, "nccl"), (None, ONE))
    assert choose(steps, ROW, None, lambda k: k == ONE).steps == ((None, ONE),)
    assert choose(steps, ROW, None, lambda k: False).steps == ()


def test_without_a_measurement_the_size_decides_at_launch():
    found = pick(OP, arguments(), H100, "auto")
    assert found.name == "triton" and found.why == "no measurement"
    assert chosen(EVERY, dtype=torch.float16).name == "triton"  # nothing was measured at this dtype
    assert pick(OP, arguments(), H100, "auto", Table("", {}, (entry(scheme="nvfp4"),))).why == "no measurement"


def test_the_nearest_width_serves_one_that_was_not_measured():
    table = Table("", {}, (entry((None, ONE), hidden=4096), entry((None, TWO), hidden=8192)))
    assert pick(OP, arguments(hidden=5120), H100, "auto", table).name == ONE
    assert pick(OP, arguments(hidden=7168), H100, "auto", table).name == TWO
    assert "at hidden 8192" in pick(OP, arguments(hidden=16384), H100, "auto", table).why


def test_a_choice_that_cannot_serve_leaves_the_built_in_one():
    assert chosen(EVERY, (None, "flashinfer:one_shot")).why.endswith("flashinfer:one_shot, which cannot serve this")
    assert chosen(EVERY, (None, "torch:two_shot"), alpha=0.5).name == "triton"


def test_a_preference_leaves_its_own_kernels_and_never_unfuses_by_measurement():
    assert chosen(Range(1, 64), preference="torch").name == "torch:two_shot"  # ours are left out, torch's newest is the default
    assert chosen(Range(5000, 8192), preference="triton").name == "triton"
    assert chosen(EVERY, preference="triton").name == f"{ONE}<={64 * ROW},{TWO}"
    assert chosen(Range(1, 64), preference="nccl").name == "nccl"


def test_variants_of_spelling_share_a_schemes_entry():
    quantised = fused.all_reduce_add_rms_norm_quantize
    table = Table("", {}, (Entry(quantised.name, "bfloat16", 2, ((None, TWO),), "fp8_tensor", 4096),))
    args = arguments(scheme="fp8_tensor:mul", layout="row", scale=torch.empty(1, device="meta"))
    assert pick(quantised, args, H100, "auto", table).name == TWO


FLASHINFER = Target(
    "cuda", 90, 2, True, backends=frozenset({"triton", "flashinfer", "torch", "nccl"}), versions={"flashinfer": "0.6.12"}
)


@pytest.mark.parametrize(
    ("args", "target", "code"),
    [
        ({}, Target("cuda", 90, 2, True, backends=FLASHINFER.backends, versions={"flashinfer": "0.6.11"}), "flashinfer_version"),
        ({}, Target("cuda", 90, 2, True, backends=FLASHINFER.backends), "flashinfer_version"),
        ({}, Target("cuda", 90, 3, True, backends=FLASHINFER.backends, versions=FLASHINFER.versions), "world_size"),
        ({"hidden": 4100}, FLASHINFER, "hidden_not_multiple_of_8"),
        ({"hidden": 8 * 1031}, FLASHINFER, "row_shape"),
        ({"hidden": 8}, FLASHINFER, "row_shape"),
        ({"weight": None}, FLASHINFER, "no_weight"),
        ({"rounding": "cast_last+keep_f32"}, FLASHINFER, "rounding"),
        ({"alpha": 0.22}, FLASHINFER, "alpha"),
        ({"bias": torch.empty(4096)}, FLASHINFER, "bias"),
        ({"scheme": "nvfp4", "layout": "linear"}, FLASHINFER, "scheme: FlashInfer's NVFP4 writes zeros on sm_90"),
        ({"scheme": "fp8_group128", "layout": "row"}, FLASHINFER, "scheme"),
        ({"scheme": "fp8_tensor:mul", "layout": "row"}, FLASHINFER, "scheme"),
    ],
)
def test_what_flashinfer_cannot_serve_is_named(args: dict[str, Any], target: Target, code: str):
    op = fused.all_reduce_add_rms_norm_quantize if "scheme" in args else OP
    found = pick(op, {"scale": None, **arguments(**args)}, target, "flashinfer")
    assert isinstance(found, Decline) and f"flashinfer:one_shot: {code}" in found.detail


@pytest.mark.parametrize(
    "scheme", [("fp8_tensor", "row"), ("fp8_group128", "col+tma+ue8m0_packed"), ("fp8_tensor:low_value", "row")]
)
def test_what_flashinfer_serves(scheme: tuple[str, str]):
    assert pick(OP, arguments(), FLASHINFER, "flashinfer").name == "flashinfer:one_shot"
    args = arguments(scheme=scheme[0], layout=scheme[1], scale=None)
    assert pick(fused.all_reduce_add_rms_norm_quantize, args, FLASHINFER, "flashinfer").name == "flashinfer:one_shot"


def test_torchs_two_shot_serves_even_worlds_and_its_one_shot_every_one():
    three = Target("cuda", 90, 3, True, backends=frozenset({"torch"}))
    assert pick(OP, arguments(), three, "torch").name == "torch:one_shot"


def test_torchs_symmetric_memory_sums_no_float16():
    here = Target("cuda", 90, 2, True, backends=frozenset({"torch"}))
    found = pick(OP, arguments(dtype=torch.float16), here, "torch")
    assert isinstance(found, Decline) and "does not sum torch.float16" in found.detail


def test_every_launcher_of_a_peer_exists():
    pytest.importorskip("triton")
    from tpfuse.ir.op import load

    for op in (fused.all_reduce_rms_norm, OP, fused.all_reduce_rms_norm_quantize, fused.all_reduce_add_rms_norm_quantize):
        kernels = [k for k in op.kernels if k.backend in ("torch", "nccl", "flashinfer")]
        assert {"nccl", "torch:one_shot", "torch:two_shot"} <= {k.name for k in kernels} and all(k.on_request for k in kernels)
        for kernel in kernels:
            assert callable(load(kernel.launch)) and (not kernel.prepare or callable(load(kernel.prepare)))


def test_the_size_of_a_call_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch):
    launched = []
    launch = {
        f"tpfuse.kernels.{module}:{OP.name}": lambda *args, module=module, alive: launched.append((module, alive))
        for module in ("allreduce_norm", "two_shot", "nccl")
    }
    monkeypatch.setattr(sys.modules["tpfuse.ir.op"], "load", lambda path: launch[path])
    launcher = OP.launcher(f"{ONE}<=1024,{TWO}<=4096,nccl")
    for rows in (4, 5, 16, 17):  # of 256 bytes
        x = torch.zeros(rows, 64)
        launcher(x, x, None, None, 1.0, 1e-6, 0.0, "cast_first", "group", alive=(True, False))
    assert [module for module, _ in launched] == ["allreduce_norm", "two_shot", "two_shot", "nccl"]
    assert all(alive == (True, False) for _, alive in launched)


def test_the_rows_that_meet_next_to_a_product():
    from tpfuse.ir import overlap
    from tpfuse.ir.op import Message

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, q = empty(6, 48), empty(6, 48, dtype=torch.float8_e4m3fn)
    args: dict[str, Any] = {"x": x, "weight": empty(48, 80)}
    assert overlap.matmul_reduce_scatter.message(args) == Message(6, 80, torch.bfloat16, across=48)
    found = overlap.scaled_matmul_reduce_scatter.message({**args, "x": q, "out_dtype": "float16"})
    assert found == Message(6, 80, torch.float16, across=48)  # sums, which are not quantised
    weights = [empty(48, 80), empty(48, 16)]
    assert overlap.all_gather_matmul.message({"x": x, "weights": weights}) == Message(6, 48, torch.bfloat16, True, 96)
    found = overlap.all_gather_scaled_matmul.message({"x": q, "weights": weights, "out_dtype": "bfloat16"})
    assert found == Message(6, 48, torch.float8_e4m3fn, True, 96) and found.row_bytes == 48


def test_the_rows_of_all_ranks_choose_the_kernel(monkeypatch: pytest.MonkeyPatch):
    from tpfuse.ir import overlap

    class Three:
        def size(self) -> int:
            return 3

    launched = []
    monkeypatch.setattr("tpfuse.shim.resolve_group", lambda name: Three())
    monkeypatch.setattr(sys.modules["tpfuse.ir.op"], "load", lambda path: lambda *args, alive: launched.append(path))
    op = overlap.all_gather_matmul
    monkeypatch.setattr(op, "kernels", [Kernel(name, name, lambda args, target: None) for name in ("nccl", "torch")])
    for rows in (8, 9):  # own ones
        args = torch.zeros(rows, 64), [torch.zeros(64, 5)], [None], None, False, "g"
        op.launcher(f"nccl<={3 * 8 * 64 * 4},torch")(*args, alive=())
    assert launched == ["nccl", "torch"]


def test_all_kernels_of_a_pick_are_prepared():
    from torch import fx

    from tpfuse.lowering.select import needs

    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("channel", "x", "residual", "weight")]
    value = torch.empty(4, 4096, dtype=torch.bfloat16, device="meta")
    for node in inputs:
        node.meta["val"] = value
    channel, x, residual, weight = inputs
    name = f"verify@layer.0|torch:one_shot<=4096,{TWO}"
    graph.call_function(OP.lowered, (channel, x, residual, weight, None, 1.0, 1e-6, 0.0, "cast_first", "g", name, 3))
    found = needs(graph)
    assert {key: need.hidden for key, need in found.items()} == {
        ("tpfuse.kernels.torch_symm:prepare", "g"): 4096, ("tpfuse.runtime.workspaces:prepare", "g"): 4096,
    }  # fmt: skip
