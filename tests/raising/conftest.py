from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def group() -> Iterator[str]:
    """The name of a process group of two ranks, of which this process is the first and the other does not exist: its
    collectives move nothing.  Enough for graphs; values over ranks are tested where there are ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()
