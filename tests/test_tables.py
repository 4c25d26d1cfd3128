"""Which table counts: the one that is named, else the machine's own, never a stale one that nobody named."""

import pytest

from tpfuse.config import Config, table_path
from tpfuse.lowering.table import BUILT_IN, Entry, Table
from tpfuse.runtime.tables import table_of

MACHINE, VERSIONS = "2 x NVIDIA H100", {"torch": "2.11.0", "kernels": "abc"}
ENTRY = Entry("all_reduce_add_rms_norm", "bfloat16", 2, ((None, "triton:one_shot"),))


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("TPFUSE_CACHE", str(tmp_path))
    path = table_path(MACHINE)
    path.parent.mkdir(parents=True)
    return path


def test_the_built_in_one_where_there_is_no_other(own):
    assert table_of(Config(), MACHINE, VERSIONS) == (BUILT_IN, [])


def test_the_machines_own_is_found(own):
    table = Table(MACHINE, VERSIONS, (ENTRY,))
    table.save(own)
    assert table_of(Config(), MACHINE, VERSIONS) == (table, [])
    assert table_of(Config(), "4 x NVIDIA H100", VERSIONS) == (BUILT_IN, [])


def test_a_stale_one_counts_only_where_it_is_named(own):
    table = Table(MACHINE, {**VERSIONS, "kernels": "old"}, (ENTRY,))
    table.save(own)
    found, (event,) = table_of(Config(), MACHINE, VERSIONS)
    assert found == BUILT_IN and event.reason.code == "stale_table" and "kernels was old, is abc" in event.reason.detail
    found, (event,) = table_of(Config(table=str(own)), MACHINE, VERSIONS)
    assert found == table and event.reason.code == "stale_table"


def test_ranks_may_keep_their_files_where_they_like():
    assert Config(table="a", dump="b").lines() == Config().lines() != Config(strict=True).lines()


def test_direct_calls_take_the_kernel_that_was_measured(group, monkeypatch):
    import functools

    import torch

    import tpfuse
    from tpfuse.ir.op import Op
    from tpfuse.target import Target

    row = 4096 * 2
    steps = ((8 * row, "triton:one_shot"), (64 * row, "cuda:one_shot"), (512 * row, "torch:two_shot"), (None, "unfused"))
    table = Table(MACHINE, VERSIONS, (Entry("all_reduce_add_rms_norm", "bfloat16", 2, steps, "", 4096),))
    target = Target("cuda", 90, 2, True, backends=frozenset({"reference", "triton", "cuda", "torch", "nccl"}))
    monkeypatch.setattr("tpfuse.ops._launches", {})
    monkeypatch.setattr("tpfuse.ops.detect", lambda device, group: target)
    monkeypatch.setattr("tpfuse.ops.table_of_group", lambda device, group: table)
    monkeypatch.setattr(Op, "launcher", lambda self, name: lambda *args, alive: name)
    op = tpfuse.ir.registry["all_reduce_add_rms_norm"]
    monkeypatch.setattr(op, "reference", functools.wraps(op.reference)(lambda *args: "the body"))

    def call(tokens, **how):
        x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta")
        return tpfuse.ops.all_reduce_add_rms_norm(x, x, x[0], group=group, **how)

    assert [call(n) for n in (1, 8, 9, 64, 513)] == ["triton:one_shot"] * 2 + ["cuda:one_shot"] * 2 + ["the body"]
    assert call(65) == "triton"  # torch's buffer was not prepared: the built-in choice
    assert call(65, kernels="torch") == "torch:two_shot" and call(513, kernels="triton") == "triton"
