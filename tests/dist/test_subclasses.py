"""Models that torchao quantises itself, on CPU: torchao's question for sm_89 is answered for it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.dist import subclasses
from tests.raising.capture import row_scales
from tpfuse.testing import RankPool

pytest.importorskip("transformers")
pytest.importorskip("torchao")
pytestmark = [pytest.mark.timeout(600), pytest.mark.parametrize("ranks", [2], indirect=True)]


def on_cpu(rank: int, world: int, name: str, granularity: str) -> dict[str, Any]:
    from torchao.quantization import quant_api

    with patch.object(quant_api, "_check_hardware_support", lambda granularities: None):
        return subclasses.measure(rank, world, name, granularity, torch.device("cpu"), dist.group.WORLD.group_name)  # type: ignore[union-attr]


@pytest.mark.parametrize("granularity", [pytest.param("row", marks=row_scales), "tensor"])
@pytest.mark.parametrize("name", subclasses.NAMES)
def test_models(ranks: RankPool, name: str, granularity: str) -> None:
    subclasses.right(ranks.run(on_cpu, name, granularity, timeout=400), name, granularity)
