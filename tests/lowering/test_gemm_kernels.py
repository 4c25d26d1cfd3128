"""Which kernel of a product next to a collective serves what, by constructed targets; no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpfuse.ir import overlap
from tpfuse.ir.chained import Chained
from tpfuse.ir.op import Op
from tpfuse.lowering.select import Pick, pick
from tpfuse.lowering.table import Entry, Table
from tpfuse.report import Decline
from tpfuse.target import Target

BACKENDS = frozenset({"reference", "cuda"})
H100 = Target("cuda", 90, 2, True, backends=BACKENDS)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scatter(k: int = 2048, n: int = 4096, dtype: torch.dtype = torch.bfloat16, **others: Any) -> dict[str, Any]:
    given = {"x": empty(64, k, dtype=dtype), "weight": empty(k, n, dtype=dtype), "bias": None}
    return {**given, "padded": True, "group": "tp", **others}


def gather(
    k: int = 4096, widths: tuple[int, ...] = (1024, 256), dtype: torch.dtype = torch.bfloat16, **others: Any
) -> dict[str, Any]:  # fmt: skip
    weights = [empty(k, n, dtype=dtype) for n in widths]
    given = {"x": empty(32, k, dtype=dtype), "weights": weights, "biases": [None] * len(weights), "rows": None, "keep": False}
    return {**given, "group": "tp", **others}


CASES = [(overlap.matmul_reduce_scatter, scatter), (overlap.all_gather_matmul, gather)]


@pytest.mark.parametrize("op, arguments", CASES, ids=lambda c: getattr(c, "name", ""))
def test_each_is_there_on_request(op: Op, arguments: Any) -> None:
    names = [k.name for k in op.kernels if k.backend == "cuda"]
    assert names and all(k.on_request and k.prepare for k in op.kernels if k.backend == "cuda")
    assert isinstance(pick(op, arguments(), H100, "auto"), Decline)
    for name in names:
        table = Table(entries=(Entry(op.name, "bfloat16", 2, ((None, name),)),))
        found = pick(op, arguments(), H100, "auto", table)
        assert isinstance(found, Pick) and found.name == name


@pytest.mark.parametrize(
    "op, args, target, code",
    [
        (overlap.matmul_reduce_scatter, scatter(n=4100), H100, "hidden_not_multiple_of_8"),
        (overlap.matmul_reduce_scatter, scatter(n=16392), H100, "hidden_too_large"),
        (overlap.matmul_reduce_scatter, scatter(dtype=torch.float32), H100, "dtype"),
        (overlap.matmul_reduce_scatter, scatter(bias=empty(4096, dtype=torch.float32)), H100, "weight_dtype"),
        (overlap.matmul_reduce_scatter, scatter(x=empty(2, 32, 2048)), H100, "dimensions"),
        (overlap.matmul_reduce_scatter, scatter(), Target("cuda", 90, 9, True, backends=BACKENDS), "world_size"),
        (overlap.matmul_reduce_scatter, scatter(), Target("cuda", 90, 2, False, backends=BACKENDS), "no_peer_access"),
        (overlap.matmul_reduce_scatter, scatter(), Target("cuda", 80, 2, True, backends=BACKENDS), "no_sm_90"),
        (overlap.all_gather_matmul, gather(k=4100), H100, "hidden_not_multiple_of_8"),
        (overlap.all_gather_matmul, gather(dtype=torch.float32), H100, "dtype"),
        (overlap.all_gather_matmul, gather(biases=[None, empty(256, dtype=torch.float16)]), H100, "weight_dtype"),
        (overlap.all_gather_matmul, gather(), Target("cuda", 90, 2, False, backends=BACKENDS), "no_peer_access"),
    ],
)
def test_declines_are_named(op: Op, args: dict[str, Any], target: Target, code: str) -> None:
    found = pick(op, args, target, "cuda")
    assert isinstance(found, Decline) and found.code == "no_kernel"
    kernels = [kernel.name for kernel in op.kernels if kernel.backend == "cuda"]
    assert f"{', '.join(kernels)}: {code}" in found.detail


SHAPE: dict[str, Any] = {"tokens": 6, "hidden": 64, "width": 64, "dtype": torch.bfloat16, "group": ""}
SCHEMES = ("fp8_tensor", "fp8_token", "fp8_group128", "nvfp4")


@pytest.mark.parametrize("op", [overlap.scaled_matmul_reduce_scatter, overlap.all_gather_scaled_matmul], ids=lambda op: op.name)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_rows(op: Op, scheme: str) -> None:
    args = op.sample(**SHAPE, scheme=scheme)
    found = pick(op, args, H100, "cuda")
    assert isinstance(found, Pick) and found.name == "cuda:chunked", found
    alphas = "alpha" if "alpha" in args else "alphas"
    for changed, code in (
        ({"out_dtype": "float8_e4m3fn"} if alphas == "alpha" or scheme not in ("fp8_tensor", "fp8_token") else None, "out_dtype"),
        ({alphas: torch.ones(1) if alphas == "alpha" else [torch.ones(1)] * 2} if scheme == "fp8_token" else None, "alpha"),
    ):
        if changed is not None:
            declined = pick(op, {**args, **changed}, H100, "cuda")
            assert isinstance(declined, Decline) and f"cuda:chunked: {code}" in declined.detail


@pytest.mark.parametrize("op", overlap.WITH_NORM, ids=lambda op: op.name)
def test_the_norm_behind_a_product(op: Chained) -> None:
    args = op.sample(**SHAPE)
    for algorithm in ("plain", "chunked"):
        entry = Entry(op.name, "bfloat16", 2, ((None, f"cuda:{algorithm}"),), scheme=args.get("w_scheme", ""))
        found = pick(op, args, H100, "auto", Table(entries=(entry,)))
        assert isinstance(found, Pick) and found.name == f"cuda:{algorithm}"
    wide = {**args, "w": torch.empty(64, 16392, dtype=args["w"].dtype, device="meta")}
    for changed, code in (
        (wide, "hidden_too_large"),
        ({**args, "residual": args["residual"].float()} if "residual" in args else None, "row_dtype"),
    ):
        if changed is not None:
            declined = pick(op, changed, H100, "cuda")
            assert isinstance(declined, Decline) and f"cuda:chunked: {code}" in declined.detail
