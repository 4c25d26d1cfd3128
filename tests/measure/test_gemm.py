"""Points of products next to collectives: sizes, limits, rows, picks, operands; no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tpfuse.cli import bench_gemm
from tpfuse.cli.inputs import BadInput
from tpfuse.formats.layouts import remove_layout
from tpfuse.ir import overlap
from tpfuse.ir.norm import add_rms_norm
from tpfuse.ir.op import Message, Op, load
from tpfuse.lowering import select
from tpfuse.lowering.table import BUILT_IN, Entry, Table
from tpfuse.measure import gemm, results
from tpfuse.measure.entries import entries
from tpfuse.measure.gemm import ALONE, GemmPoint
from tpfuse.measure.points import AGAIN, Sweep
from tpfuse.target import Range, Target

H100 = Target("cuda", 90, 2, True, backends=frozenset({"reference", "triton", "cuda", "torch", "nccl"}))
RS, AG, NORM = gemm.SCATTER, gemm.GATHER, gemm.WITH_NORM
SCHEMES = ("", "fp8_tensor", "fp8_token", "fp8_group128", "nvfp4")


class FakeGroup:
    group_name = "g"

    def rank(self) -> int:
        return 0


def point(operator: str = RS, scheme: str = "", tokens: int = 512) -> GemmPoint:
    return GemmPoint(operator, scheme, 4096, 14336, tokens, 2)


def test_the_two_projections_of_a_layer():
    assert (point().weight, point().given) == ((7168, 4096), 512)
    assert (point(AG).weight, point(AG).given) == ((4096, 14336), 256)
    assert point().message == Message(512, 4096, torch.bfloat16, across=7168)
    assert point(AG, "fp8_token").message == Message(256, 4096, torch.float8_e4m3fn, True, 14336)
    assert point(AG, "nvfp4").message.row_bytes == 2048


def test_the_limit_is_the_product_or_the_link():
    assert point().limit_us(100.0) == 100.0
    assert point(tokens=8192).limit_us(1.0) == pytest.approx(4096 * 4096 * 2 / 380e9 * 1e6)
    assert point(AG, "fp8_tensor", 8192).limit_us(1.0) == pytest.approx(4096 * 4096 / 380e9 * 1e6)


def test_long_calls_are_few_to_a_graph():
    calls = [GemmPoint(RS, "", 8192, 28672, n, 2).calls for n in (512, 2048, 8192)]
    assert calls == [4, 2, 1]


@pytest.mark.parametrize("operator", [RS, AG, NORM])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_peer_and_own_kernel_that_serves(operator: str, scheme: str):
    found = {gemm.impl_of(k.name) for k in gemm.usable(point(operator, scheme), gemm.shapes(point(operator, scheme)), H100)}
    own = {"tpfuse:push", "tpfuse:chunked"} if operator == AG else {"tpfuse:plain", "tpfuse:chunked"}
    torchs = {gemm.TORCH} if scheme in ("", "fp8_tensor", "fp8_token") else set()
    assert found == own | (torchs | {gemm.NCCL} if operator != NORM else set())


def test_what_lowering_picks():
    assert gemm.picked_impl(point(), H100, BUILT_IN) == gemm.NCCL
    assert gemm.picked_impl(point(scheme="fp8_group128"), H100, BUILT_IN) is None
    row = 4096 * 2
    entry = Entry(RS, "bfloat16", 2, ((1024 * row, "nccl"), (4096 * row, "cuda:chunked"), (None, "torch:fused")), "", 4096, 7168)
    table = Table("", {}, (entry,))
    found = [gemm.picked_impl(point(tokens=n), H100, table) for n in (1024, 2048, 8192)]
    assert found == [gemm.NCCL, "tpfuse:chunked", gemm.TORCH]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("operator", [RS, AG, NORM])
def test_lowering_finds_the_entry_that_a_points_rows_make(operator: str, scheme: str):
    """Every other choice at every other size: what is read is what was written for just this operator and these sizes."""
    names = [k.name for k in gemm.usable(point(operator, scheme), gemm.shapes(point(operator, scheme)), H100)]
    counts = (128, 512, 2048, 8192)
    wanted = {n: names[i % len(names)] for i, n in enumerate(counts)}
    points = [point(operator, scheme, n) for n in counts]
    rows = [row for p in points for row in p.rows(
        {ALONE: [50.0], **{name: [60.0 - 5 * (name == wanted[p.tokens])] for name in names}, ALONE + AGAIN: [50.0]}, 2, None)]
    table = Table("", {}, tuple(entries(gemm.by_message(points, rows))))
    for other in (AG, RS, NORM):
        for p in (point(other, scheme, n) for n in counts):
            found = select.pick(p.op, gemm.shapes(p), H100, "auto", table, Range(p.tokens, p.tokens))
            picked = found.name if isinstance(found, select.Pick) else None
            assert picked == (wanted[p.tokens] if other == operator else None), (other, p.tokens)


@pytest.mark.parametrize("scheme", ["", "fp8_tensor"])
def test_any_norm_behind_a_product_is_judged_by_the_one_that_was_measured(scheme: str):
    """By the product's own scheme; a shape that was not measured by the nearest."""
    p = point(NORM, scheme)
    table = Table("", {}, (Entry(p.op.name, "bfloat16", 2, ((None, "cuda:chunked"),), scheme, 8192, 7168),))
    args, product = gemm.shapes(p), "scaled_matmul" if scheme else "matmul"
    second = {"weight2": args["weight"], "eps2": 1e-6, "rounding2": args["rounding"]}
    given = {**args, **second, "scale": None, "scheme": "fp8_group128", "layout": "row"}
    for op in overlap.WITH_NORM:
        found = select.measured(op, {n: given[n] for n in op.params}, H100, table) if op.first.name == product else None
        assert (found is not None) == (op.first.name == product)
    none = select.measured(gemm.GemmPoint(RS, scheme, 4096, 14336, 512, 2).op, gemm.shapes(point(RS, scheme)), H100, table)
    assert none is None


def test_what_a_norm_behind_a_product_is_given(group: str):
    for scheme in SCHEMES:
        small = GemmPoint(NORM, scheme, 256, 512, 33, 2)
        made = gemm.make(small, 64, 1, "cpu")
        x, scale = gemm.rows_of(small, made, 33)
        args = gemm.bound(small, {**made, "x": x, "x_scale": scale}, group)
        args["padded"] = True
        out = small.op.fake(*args.values())
        assert len(out) == len(small.alive) and out[-1].shape == args["residual"].shape == (17, 256)
        assert args["w" if "w" in args else "weight"].shape == (512 // 2 // (2 if scheme == "nvfp4" else 1), 256)


def test_what_is_measured_unfused_is_the_fastest_product_and_a_norm(monkeypatch: pytest.MonkeyPatch):
    """Two ranks with the same rows: their sum is twice the product."""
    loads: list[str] = []

    def norm_for(path: str) -> Any:
        loads.append(path)
        return _norm if "norm_quant" in path else load(path)

    monkeypatch.setattr(gemm, "load", norm_for)

    calls = []

    def launcher(name: str) -> Any:
        calls.append(name)
        return lambda x, weight, bias, padded, group, *, alive: 2 * (x @ weight)[:16]

    built: Any = gemm.Gemms(FakeGroup(), Target("cpu"), 64, 256, "cpu")  # type: ignore[arg-type]
    small = GemmPoint(NORM, "", 256, 512, 32, 2)
    product = GemmPoint(RS, "", 256, 512, 32, 2)
    monkeypatch.setattr(product.op, "launcher", launcher)
    assert gemm.UNFUSED not in built.kernels(small)
    times = {ALONE: [50.0], "nccl": [80.0], "torch:fused": [70.0], "cuda:plain": [71.0], ALONE + AGAIN: [50.0]}
    built.learn(product, product.rows(times, 2, None))
    norm, h = built.kernels(small)[gemm.UNFUSED](0)
    args = built.operands(small)
    expected = 2 * (args["x"][:32] @ args["weight"])[:16] + 0.5
    assert calls == ["torch:fused"] and loads[-1] == "tpfuse.kernels.norm_quant:add_rms_norm"
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(norm, add_rms_norm.reference(expected, torch.zeros_like(h), torch.ones(256).bfloat16(), 1e-6)[0])


def _norm(x: torch.Tensor, *args: Any, alive: tuple[bool, ...]) -> Any:
    return add_rms_norm.reference(x, *args)


def test_samples_are_fewer_where_calls_are_long():
    counts = [GemmPoint(AG, "", 8192, 28672, n, 2).trials(15) for n in (128, 1024, 8192)]
    assert counts == [15, 10, 5] and GemmPoint(AG, "", 8192, 28672, 8192, 2).trials(2) == 2


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("operator", [RS, AG])
def test_operands_stand_for_what_was_quantised(operator: str, scheme: str):
    from tpfuse.ir.matmul import _rows_value, _weight_value

    small = GemmPoint(operator, scheme, 256, 512, 32, 2)
    plain = gemm.make(GemmPoint(operator, "", 256, 512, 32, 2), 64, 1, "cpu")
    made = gemm.make(small, 64, 1, "cpu")
    x, scale = gemm.rows_of(small, made, small.given)
    how = gemm.attributes(small)
    values = _rows_value(x, scale, scheme, small.layout, torch.float32)
    weight = _weight_value(made["weight"], made["weight_scale"], scheme, how["weight_layout"], torch.float32)
    if scheme == "nvfp4":  # both global scales are in alpha
        values, weight = values / 200.0, weight / 200.0
        assert float(made["alpha"]) == pytest.approx(1 / 200.0**2)
    for got, want in ((values, plain["x"][: small.given]), (weight, plain["weight"])):
        assert float((got - want.float()).norm() / want.float().norm()) < (0.15 if scheme == "nvfp4" else 0.04)
    bound = gemm.bound(small, {**made, "x": x, "x_scale": scale}, "g")
    assert list(bound) == small.op.params
    expected = gemm.shapes(small)
    assert bound["x"].shape == expected["x"].shape and bound["x"].dtype == expected["x"].dtype
    if scheme == "fp8_group128":
        assert scale.stride() == (1, small.given)
        assert torch.equal(remove_layout(scale, small.given, scale.shape[1], "col"), made["x_scale"][: small.given])


@pytest.mark.parametrize("operator", [RS, AG])
def test_the_product_alone_is_of_all_rows(operator: str):
    small = GemmPoint(operator, "", 256, 512, 32, 2)

    built: Any = gemm.Gemms(FakeGroup(), H100, 64, 256, "cpu")  # type: ignore[arg-type]
    out = built.alone(small)(0)
    args = built.operands(small)
    torch.testing.assert_close(out, args["x"][:32] @ args["weight"])
    assert built.arguments(small)["x"].shape[0] == small.given


def test_rows_of_a_result_file():
    times = {ALONE: 100.0, "nccl+cublas": 130.0, "tpfuse:chunked": 104.0, ALONE + AGAIN: 102.0}
    sweep = Sweep(2, lambda point: dict.fromkeys(times, lambda i: None), lambda impls, calls: {k: [times[k]] for k in impls},
                  lambda mine: [mine, mine])  # fmt: skip
    rows = sweep.run([point(AG)], lambda point: "tpfuse:chunked")
    assert [r["impl"] for r in rows] == list(times) and [r.get("picked") for r in rows] == [None, None, True, None]
    where = [(r["op"], r["tokens"], r["hidden"], r["intermediate"], r["limit_us"]) for r in rows]
    assert where == [(AG, 512, 4096, 14336, 100.0)] * 4


def test_the_table_shows_what_a_collective_costs(capsys):
    from rich.console import Console

    times = {ALONE: [100.0], "nccl+cublas": [130.0], "tpfuse:chunked": [104.0], ALONE + AGAIN: [100.0]}
    document = results.document("gemm", point().rows(times, 2, "tpfuse:chunked"), world=2, notes=["a note"])
    bench_gemm.show(Console(width=160), document)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "tpfuse:chunked*" in line)
    assert "1.040" in line and "1.25×" in line and "1.04" in line and "a note" in out


def test_a_plot_for_each_operator(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from tpfuse.cli.plots import save

    times = {ALONE: [100.0], "nccl+cublas": [130.0], "tpfuse:chunked": [104.0], ALONE + AGAIN: [100.0]}
    rows = [row for operator in (RS, NORM) for scheme in ("", "fp8_tensor") for n in (512, 1024)
            for row in point(operator, scheme, n).rows(times, 2, None)]  # fmt: skip
    document = {**results.document("gemm", rows, world=2), "machine": {"gpu": "H100", "count": 2}}
    files = save(document, tmp_path / "gemm.svg")
    assert [f.name for f in files] == [f"gemm-{op}{end}" for op in (RS, NORM) for end in (".png", ".svg")]
    text = files[1].read_text()
    assert "time ÷ product alone" in text.replace("<!-- ", "").replace(" -->", "") and len(text) > 10_000


def test_peers_in_front_of_a_norm_have_one_of_their_own(monkeypatch: pytest.MonkeyPatch):
    built: Any = gemm.Gemms(FakeGroup(), H100, 64, 256, "cpu")  # type: ignore[arg-type]
    made = []
    monkeypatch.setattr(built, "prepare", lambda path: None)
    monkeypatch.setattr(built, "unfused", lambda point, product, kernel: made.append((product.op.name, kernel)) or kernel)
    monkeypatch.setattr(Op, "launcher", lambda self, name: print)
    small = GemmPoint(NORM, "fp8_token", 256, 512, 32, 2)
    assert list(built.named(small)) == [
        ALONE, "tpfuse:plain", "tpfuse:chunked", gemm.NCCL, gemm.TORCH, ALONE + AGAIN,
    ]  # fmt: skip
    assert made == [("scaled_matmul_reduce_scatter", "nccl"), ("scaled_matmul_reduce_scatter", "torch:fused")]
    assert not {gemm.NCCL, gemm.TORCH} & set(built.kernels(small))


def test_tables_of_the_documents_take_such_rows():
    from tools import tables

    times = {ALONE: [100.0], "nccl+cublas": [130.0], "tpfuse:chunked": [104.0], ALONE + AGAIN: [100.0]}
    (found,) = tables.points({"what": "gemm", "table": None, "rows": point().rows(times, 2, None)})
    assert (found.ours, found.peer, found.where["intermediate"]) == ("tpfuse:chunked", "nccl+cublas", 14336)


@pytest.mark.parametrize(
    ("operators", "tokens", "sizes", "told"),
    [
        (["matmul"], [512], [(4096, 14336)], "unknown operator 'matmul'"),
        ([RS], [511], [(4096, 14336)], "multiples of 2 tokens"),
        ([RS], [512], [(4096, 14336 + 128)], "multiples of 128"),
    ],
)
def test_what_cannot_be_measured(operators: list[str], tokens: list[int], sizes: list[tuple[int, int]], told: str):
    with pytest.raises(BadInput, match=told):
        bench_gemm.grid(operators, [""], sizes, tokens, 2, "bfloat16")


def test_ranks_need_gpus(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("tpfuse.cli.bench.launch", lambda *_, **__: pytest.fail("a rank was started"))
    with pytest.raises(BadInput, match="0 GPUs are visible"):
        bench_gemm.bench(Console(), 2, [RS], [512], [(4096, 14336)], [""], "bfloat16", 1, BUILT_IN, None, None, None, None)


@pytest.mark.parametrize("operator", [RS, AG])
@pytest.mark.parametrize("scheme", ["", "fp8_tensor"])
def test_every_launcher_of_a_peer_exists(operator: str, scheme: str):
    pytest.importorskip("triton")
    kernels = [k for k in point(operator, scheme).op.kernels if k.backend in ("nccl", "torch")]
    assert [k.name for k in kernels] == ["nccl", "torch:fused"] and all(k.on_request for k in kernels)
    for kernel in kernels:
        assert callable(load(kernel.launch)) and (not kernel.prepare or callable(load(kernel.prepare)))
