"""Models whose linear layers torchao itself quantises to FP8, on CUDA: graphs as CUDA builds of torch make them, reference bodies
over NCCL, a GPU per rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tpfuse.testing import RankPool

pytest.importorskip("transformers")
pytest.importorskip("torchao")
from tests.dist import subclasses  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs sm_89"),
    pytest.mark.timeout(300),
    pytest.mark.parametrize("ranks", [2], indirect=True),
]


def on_cuda(rank: int, world: int, name: str, granularity: str) -> dict[str, Any]:
    torch.cuda.set_device(rank)
    group: Any = dist.new_group(backend="nccl")
    return subclasses.measure(rank, world, name, granularity, torch.device("cuda", rank), group.group_name)


@pytest.mark.parametrize("granularity", subclasses.GRANULARITIES)
@pytest.mark.parametrize("name", subclasses.NAMES)
def test_models(ranks: RankPool, name: str, granularity: str) -> None:
    subclasses.right(ranks.run(on_cuda, name, granularity, timeout=280), name, granularity)
