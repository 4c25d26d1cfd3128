"""A measurement's ranks leave nothing open."""

import torch
import torch.distributed as dist

from tpfuse.measure.ranks import Ranks


def test_groups_are_closed(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    Ranks(dist.group.WORLD, dist.new_group(backend="gloo"), None, None, []).leave()
    assert not dist.is_initialized()
