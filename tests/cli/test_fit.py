"""Tables at every width: no name is broken, nothing is left out."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from tpfuse.cli import bench, bench_e2e, bench_gemm, doctor, fit, tables, tune

NAMES = ("all_reduce_rms_norm_add_rms_norm", "model.layers.*.self_attn.o_proj")


def printed(show, *args, width):
    console = Console(file=io.StringIO(), width=width)
    show(console, *args)
    return console.file.getvalue()


def event(status, rule, reason=None):
    attributes = {"kernel": "triton:one_shot<=1048576,triton:two_shot"} if status == "lowered" else {}
    return {"status": status, "rule": rule, "site": "model.layers.3.self_attn.o_proj", "range": [1, 256], "reason": reason,
            "attributes": attributes}  # fmt: skip


REPORT = {
    "events": [
        event("fired", NAMES[0]), event("lowered", NAMES[0]),
        event("declined", "sequence_parallel", {"code": "unmeasured", "detail": "no measurement says that it pays here"}),
    ],
    "ranges": [], "verified": [],
}  # fmt: skip


@pytest.mark.parametrize("width", [30, 60, 80, 100, 130, 200])
def test_a_report(width):
    text = printed(tables.show_report, REPORT, width=width)
    for word in (*NAMES, "sequence_parallel", "unmeasured:", "measurement"):
        assert word in text or len(word) + 2 > width, f"{word}\n{text}"
    assert all(len(line) <= width for line in text.splitlines())
    assert ("┃" in text) is (width == 200)


@pytest.mark.parametrize("width", [40, 80])
def test_measurements(width):
    row = {"op": "all_reduce_add_rms_norm", "scheme": "fp8_group128", "dtype": "bfloat16", "hidden": 8192, "tokens": 2048,
           "intermediate": 28672, "impl": "flashinfer_one_shot_pdl_early", "us": 12.5, "limit_us": 5.0}  # fmt: skip
    rows = [row, {**row, "impl": "nccl+inductor"}, {**row, "impl": "no_collective", "us": 9.0}, {**row, "impl": "gemm_alone"}]
    document = {"baseline": "nccl+inductor", "rows": rows, "notes": []}
    for show, given in ((bench.show, document), (bench_gemm.show, document), (bench_e2e.show, rows)):
        text = printed(show, given, width=width)
        assert all(word in text for word in ("all_reduce_add_rms_norm", "flashinfer_one_shot_pdl_early", "12.5", "nccl+inductor"))
        assert all(len(line) <= width for line in text.splitlines())


def test_choices():
    from tpfuse.lowering.table import Entry, Table

    steps = ((1 << 20, "triton:one_shot"), (None, "flashinfer:two_shot"))
    table = Table("2 x GPU", {}, (Entry("all_reduce_add_rms_norm_quantize", "bfloat16", 2, steps, "fp8_group128", 8192),))
    text = printed(tune.show, table, width=70)
    assert "all_reduce_add_rms_norm_quantize" in text and "flashinfer:two_shot" in text and "up to 1048576" in text


@pytest.mark.parametrize("width", [40, 60, 80])
def test_doctor(width):
    facts = [doctor.Fact("Engines' operators", "_C::dynamic_per_token_scaled_fp8_quant", False, "no such operator here")]
    text = printed(doctor.show, facts, width=width)
    assert "_C::dynamic_per_token_scaled_fp8_quant" in text and "no such operator here" in " ".join(text.split())


def test_a_table_is_as_wide_as_it_needs_to_be():
    table = Table(title="Sites")
    for name in ("Rule", "Reason"):
        table.add_column(name)
    table.add_row("a_rule", "for no reason at all")
    wide = printed(fit.show, table, width=200)
    assert max(map(len, wide.splitlines())) == 3 * 2 + 1 + len("a_rule") + len("for no reason at all")
    narrow = printed(fit.show, table, width=24)
    assert "a_rule" in narrow and "┃" in narrow and max(map(len, narrow.splitlines())) <= 24
