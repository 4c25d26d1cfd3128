"""Tables of thresholds: reading, choosing, ranges from bytes, staleness."""

import json
from dataclasses import replace

import pytest
import torch

from tpfuse.lowering.table import BUILT_IN, Entry, Table
from tpfuse.target import UNBOUNDED, Range

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}
SP = Entry("sequence_parallel", "bfloat16", 2, ((1 << 20, "off"), (None, "on")))
WIDE = Entry("sequence_parallel", "bfloat16", 2, ((1 << 22, "off"), (None, "on")), hidden=8192)
NORM = Entry("all_reduce_add_rms_norm", "bfloat16", 2, ((1 << 19, "triton:one_shot"), (None, "unfused")))
TABLE = Table("2 x NVIDIA H100", VERSIONS, (SP, WIDE, NORM))


def test_file_round_trip(tmp_path):
    TABLE.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == TABLE
    assert Table.load(tmp_path / "table.json").digest == TABLE.digest != BUILT_IN.digest


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"machine": "", "versions": {}, "entries": [{"op": "x"}]}'], ids=["empty", "list", "none", "entry"]
)
def test_what_is_no_table(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match="table.json is no table"):
        Table.load(tmp_path / "table.json")


@pytest.mark.parametrize("steps", [(), ((5, "on"),), ((None, "on"), (None, "off")), ((9, "a"), (5, "b"), (None, "c"))])
def test_steps_ascend_and_end_open(steps):
    with pytest.raises(ValueError, match="steps must ascend"):
        Entry("sequence_parallel", "bfloat16", 2, steps)


def test_a_step_holds_up_to_and_with_its_bytes():
    assert [SP.choice(n) for n in (1, 1 << 20, (1 << 20) + 1)] == ["off", "off", "on"]


def test_the_width_measured_wins_over_every_width():
    assert TABLE.find("sequence_parallel", torch.bfloat16, 2, hidden=8192) == WIDE
    assert TABLE.find("sequence_parallel", torch.bfloat16, 2, hidden=4096) == SP


def test_the_nearest_sizes_count_the_messages_width_first():
    found = [Entry("matmul_reduce_scatter", "bfloat16", 2, ((None, str(i)),), "", n, k)
             for i, (n, k) in enumerate([(4096, 7168), (8192, 4096), (8192, 14336)])]  # fmt: skip
    table = Table("", {}, tuple(found))

    def nearest(hidden: int, across: int | None) -> str:
        entry = table.find("matmul_reduce_scatter", torch.bfloat16, 2, "", hidden, across)
        assert entry is not None
        return entry.choice(1)

    assert [nearest(4096, 4096), nearest(8192, 4096), nearest(7168, 10240), nearest(8192, 5120)] == ["0", "1", "2", "1"]


@pytest.mark.parametrize(
    ("dtype", "world", "limits", "code"),
    [
        (torch.bfloat16, 2, (1, 128), "threshold"),  # 8 KiB a token: 1 MiB
        (torch.bfloat16, 2, (129, 512), None),
        (torch.bfloat16, 2, (100, 512), None),  # two doublings against a third of one
        (torch.bfloat16, 2, (1, 512), "threshold"),
        (torch.bfloat16, 2, (100, UNBOUNDED), None),
        (torch.bfloat16, 2, (7, 7), "threshold"),
        (torch.float16, 2, (4096, 8192), "unmeasured"),
        (torch.bfloat16, 4, (4096, 8192), "unmeasured"),
    ],
)
def test_a_pass_that_does_not_pay_is_refused_by_name(dtype, world, limits, code):
    refused = TABLE.refuses("sequence_parallel", dtype, world, Range(*limits), 4096)
    assert (refused.code if refused else None) == code


def test_nothing_measured_refuses_everything_and_cuts_no_range():
    assert BUILT_IN.refuses("sequence_parallel", torch.bfloat16, 2, Range(4096, UNBOUNDED), 4096).code == "unmeasured"
    assert BUILT_IN.thresholds([(torch.bfloat16, 2, 4096)]) == []


def test_thresholds_in_tokens():
    # 8 KiB a token: 512 KiB are 64 tokens, 1 MiB 128; at a width of 8192 the 4 MiB of its own entry are 256.
    # Where a pass begins to pay counts before where a kernel does.
    assert TABLE.thresholds([(torch.bfloat16, 2, 4096)]) == [128, 64]
    assert TABLE.thresholds([(torch.bfloat16, 2, 8192)]) == [256, 32]
    assert TABLE.thresholds([(torch.float32, 2, 4096)]) == []


def test_thresholds_of_every_other_dimension_of_the_weights():
    entries = [Entry("matmul_reduce_scatter", "bfloat16", 2, ((n * 8192, "unfused"), (None, "cuda:chunked")), "", 4096, k)
               for n, k in ((128, 7168), (512, 2048))]  # fmt: skip
    other = Entry("matmul_reduce_scatter", "bfloat16", 2, ((1 << 20, "unfused"), (None, "cuda:chunked")), "", 8192, 7168)
    assert Table("", {}, (*entries, other)).thresholds([(torch.bfloat16, 2, 4096)]) == [128, 512]


def test_stale():
    assert TABLE.stale("2 x NVIDIA H100", VERSIONS) is None
    other = TABLE.stale("2 x NVIDIA H200", {**VERSIONS, "flashinfer": "0.6.12"})
    assert other.code == "stale_table"
    assert "machine was 2 x NVIDIA H100, is 2 x NVIDIA H200" in other.detail
    assert "flashinfer was none, is 0.6.12" in other.detail


def test_json_is_what_the_docstring_shows():
    times = ((4 << 20, (("off", 41.5), ("on", 47.25))), (16 << 20, (("off", 160.5), ("on", 121.0))))
    table = Table("m", VERSIONS, (replace(SP, times=times),))
    assert Table.parse(table.to_json()).entries[0].times == times
    data = json.loads(table.to_json())
    assert data["entries"][0] == {
        "op": "sequence_parallel", "dtype": "bfloat16", "world": 2, "scheme": "", "hidden": None, "across": None,
        "steps": [[1 << 20, "off"], [None, "on"]],
        "times": [[4 << 20, {"off": 41.5, "on": 47.25}], [16 << 20, {"off": 160.5, "on": 121.0}]],
    }  # fmt: skip
    del data["entries"][0]["times"]  # a table from before there were any
    assert Table.parse(json.dumps(data)).entries == (SP,)


def test_a_chain_is_judged_by_its_own_scheme_or_by_plain_rows():
    fp8 = Entry("sequence_parallel", "bfloat16", 2, ((1 << 10, "off"), (None, "on")), "fp8_tensor")
    table = Table("", {}, (SP, fp8))
    limits = Range(4, 8)
    assert table.refuses("sequence_parallel", torch.bfloat16, 2, limits, 4096, "fp8_tensor") is None
    assert table.refuses("sequence_parallel", torch.bfloat16, 2, limits, 4096).code == "threshold"
    assert table.refuses("sequence_parallel", torch.bfloat16, 2, limits, 4096, "nvfp4").code == "threshold"


def test_a_scheme_that_the_graph_does_not_hold_cuts_no_range():
    fp8 = Entry("sequence_parallel", "bfloat16", 2, ((1 << 19, "off"), (None, "on")), "fp8_tensor")
    site = [(torch.bfloat16, 2, 4096)]
    assert Table("", {}, (SP, fp8)).thresholds(site, {""}) == [128]
    assert Table("", {}, (SP, fp8)).thresholds(site, {"", "fp8_tensor"}) == Table("", {}, (SP, fp8)).thresholds(site) == [64, 128]


def test_a_width_that_was_a_symbol_is_looked_up_as_the_number_it_is():
    """Weights that are a graph's inputs have symbols, which products with other sizes pin down."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, SymInt

    from tpfuse.ir.op import Message

    env = ShapeEnv()
    width, free = (env.create_unbacked_symint() for _ in range(2))
    torch._check(width == 64)
    assert isinstance(width, SymInt)
    found = Message(free, width, torch.bfloat16, across=width).fixed
    assert found is not None and type(found.columns) is int and found == Message(free, 64, torch.bfloat16, across=64)
    assert Message(free, free, torch.bfloat16).fixed is None
    assert Message(free, 64, torch.bfloat16, across=free).fixed == Message(free, 64, torch.bfloat16)
