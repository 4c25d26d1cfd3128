"""The life of workspaces and regions on one rank, without a GPU: who keeps memory, and what graphs that were captured reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric
from torch.multiprocessing.reductions import StorageWeakRef

from tpfuse import shim
from tpfuse.kernels import regions, torch_products, workspace
from tpfuse.kernels.channel import NOWHERE, Channel, Link
from tpfuse.kernels.regions import SCATTER
from tpfuse.report import FusionError


class Group:
    group_name = "tp"

    def __init__(self, world: int = 2) -> None:
        self.size, self.rank = lambda: world, lambda: 0


class Machine:
    """Rank 0 of two.  capturing: whether a graph is.  room: symmetric buffers that there is memory for.  agreed: with the other
    rank, which says the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.room, self.agreed, self.made = False, 100, [], []
        self.group = Group()
        create, memory, cpu = Channel.create, Link.memory, torch.device("cpu")
        patches: dict[Any, dict[str, Any]] = {
            shim: {
                "group_of": lambda name: self.group, "is_capturing": lambda: self.capturing, "symmetric_buffer": self._buffer,
                "peer_views": lambda buffer, addresses, handle: [buffer, *map(torch.empty_like, [buffer] * len(addresses[1:]))],
            },
            torch.cuda: {
                "synchronize": lambda: None, "current_device": lambda: 0, "Stream": lambda *args, **kwargs: None,
                "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
                "current_stream": lambda: SimpleNamespace(cuda_stream=0), "is_current_stream_capturing": lambda: self.capturing,
            },
            workspace: {"agree": self._agree, "_workspaces": {}, "_groups": {}},
            regions: {"agree": self._agree, "_regions": {}},
            Channel: {"create": lambda rank, world, layout, device, *more: create(rank, world, layout, cpu, *more)},
            Link: {"memory": lambda world, device, timeout: memory(world, cpu, timeout)},
        }  # fmt: skip
        for where, values in patches.items():
            for name, value in values.items():
                monkeypatch.setattr(where, name, value)

    def _agree(self, group: Any, what: Any, timeout: float) -> None:
        self.agreed.append(what)

    def _buffer(self, size: int, group: Any) -> tuple[torch.Tensor, list[int], None]:
        if len(self.made) == self.room:
            raise torch.OutOfMemoryError
        buffer = torch.empty(size, dtype=torch.int8)
        self.made.append(StorageWeakRef(buffer.untyped_storage()))
        return buffer, [buffer.data_ptr(), *(4096,) * (group.size() - 1)], None

    def living(self) -> list[bool]:
        """Of the buffers in the order that they were made in."""
        return [not made.expired() for made in self.made]


def reached(link: Link) -> bool:
    """Whether kernels find buffers."""
    return all(0 < address < NOWHERE for address in link.table.tolist())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_captured_graph_survives_that_its_workspace_is_enlarged(machine: Machine) -> None:
    workspace.prepare("tp", 4, 64, channels=1)
    machine.capturing = True
    captured = workspace.channel_of("tp")
    machine.capturing = False
    reached, state = captured.table.tolist(), StorageWeakRef(captured.state.untyped_storage())
    table = StorageWeakRef(captured.table.untyped_storage())
    del captured  # a graph knows addresses alone
    larger = workspace.prepare("tp", 8, 64, channels=1)
    assert machine.living() == [True, True] and not table.expired() and not state.expired()
    assert workspace.channel_of("tp") is larger.channels[0] and larger.channels[0].table.tolist() != reached
    workspace.release("tp")
    assert machine.living() == [False, False] and not table.expired()
    workspace.restore("tp")
    old, new = workspace._workspaces["tp"]
    assert len(machine.made) == 4 and new is larger
    assert all(one.channels[0].table[0] == one.buffers[0][0].data_ptr() for one in (old, new))


def test_what_no_graph_holds_is_given_back(machine: Machine) -> None:
    workspace.prepare("tp", 4, 64, channels=1)
    workspace.channel_of("tp")
    workspace.prepare("tp", 8, 64, channels=1)
    assert machine.living() == [False, True]


def test_ranks_agree_on_what_is_kept(machine: Machine) -> None:
    workspace.prepare("tp", 4, 64)
    workspace.prepare("tp", 8, 64)
    assert [said["captured"] for said in machine.agreed if "captured" in said] == [False]


def test_prepared_again_after_a_release_is_restored(machine: Machine) -> None:
    made = workspace.prepare("tp", 4, 64)
    workspace.release("tp")
    with pytest.raises(FusionError, match="released"):
        workspace.channel_of("tp")
    assert workspace.prepare("tp", 4, 64) is made
    assert [channel.table[0] for channel in made.channels] == [buffer.data_ptr() for buffer, _ in made.buffers]


def test_a_released_workspace_is_reached_by_no_graph(machine: Machine) -> None:
    made = workspace.prepare("tp", 4, 64, channels=2)
    assert all(reached(channel) for channel in made.channels)
    workspace.release("tp")
    assert not any(reached(channel) for channel in made.channels)


def test_a_workspace_is_there_wholly_or_not_at_all(machine: Machine) -> None:
    machine.room = 2
    with pytest.raises(torch.OutOfMemoryError):
        workspace.prepare("tp", 4, 64, channels=3)
    with pytest.raises(FusionError, match="released"):
        workspace.channel_of("tp")
    assert machine.living() == [False, False]
    machine.room = 100
    workspace.restore("tp")
    assert len(workspace._workspaces["tp"][0].buffers) == 3 and reached(workspace.channel_of("tp"))


def test_lost_peers_are_looked_for_while_groups_are_added(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = workspace.prepare("tp", 4, 64)

    def lost_peer(self: Any) -> None:
        workspace._workspaces[str(len(workspace._workspaces))] = [made]
        regions._regions[str(len(regions._regions)), SCATTER] = []

    monkeypatch.setattr(Channel, "lost_peer", lost_peer)
    assert workspace.lost_peers() == [] and regions.lost_peers() == []


def test_a_released_region_is_reached_by_no_graph_ever(machine: Machine) -> None:
    every = []
    for tokens in (4, 8):
        regions.prepare(SCATTER, "tp", tokens, 64)
        machine.capturing = True
        every.append(regions.region_of(SCATTER, "tp"))
        machine.capturing = False
    first, second = every
    assert reached(first) and reached(second) and machine.living() == [True, True]
    regions.release("tp")
    with pytest.raises(FusionError, match="no scatter region"):
        regions.region_of(SCATTER, "tp")
    regions.restore("tp")
    third = regions.region_of(SCATTER, "tp")
    assert reached(third) and third.layout == second.layout and not reached(first) and not reached(second)
    assert machine.living() == [False, False, True]


def test_regions_that_no_graph_holds_leave_nothing(machine: Machine) -> None:
    regions.prepare(SCATTER, "tp", 4, 64)
    regions.region_of(SCATTER, "tp")
    regions.prepare(SCATTER, "tp", 8, 64)
    for _ in range(3):
        regions.release("tp")
        regions.restore("tp")
    assert reached(regions.region_of(SCATTER, "tp"))
    assert machine.living() == [False] * 4 + [True] and len(regions._regions["tp", SCATTER]) == 1


def test_what_torch_gives_back_is_kept_for_graphs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, torch.Tensor] = {}

    def workspace_of(name: str, min_size: int) -> None:
        if name not in made or made[name].numel() < min_size:
            made[name] = machine._buffer(min_size, machine.group)[0]

    monkeypatch.setattr(symmetric, "get_symm_mem_workspace", workspace_of)
    monkeypatch.setattr(symmetric, "_group_name_to_workspace_tensor", made)
    monkeypatch.setattr(torch_products, "share", lambda rows, group: rows // 2)
    monkeypatch.setattr(torch_products, "_workspaces", {})
    for tokens in (4, 4, 8, 4, 8):
        torch_products.prepare("tp", tokens, 64)
    assert machine.living() == [True, True] and len(torch_products._workspaces["tp"]) == 2


def test_a_name_that_is_given_again_is_another_group(machine: Machine) -> None:
    workspace.prepare("tp", 4, 64)
    regions.prepare(SCATTER, "tp", 4, 64)
    machine.group = Group(world=4)
    assert workspace.prepare("tp", 4, 64).channels[0].world == 4 and workspace.channel_of("tp").world == 4
    assert regions.prepare(SCATTER, "tp", 4, 64).world == 4
    assert machine.living() == [False] * 4 + [True] * 4
    assert workspace.prepare("tp", 4, 64) is workspace._workspaces["tp"][0]
