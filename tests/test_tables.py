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
