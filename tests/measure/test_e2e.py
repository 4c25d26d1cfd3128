"""The stack that end-to-end figures are measured on: what is compared is the same model, and all of it fuses."""

import pytest
import torch
import torch.distributed as dist

from tpfuse.config import Config
from tpfuse.measure.e2e import PLAIN, ROOM, Runner, Variant, closed
from tpfuse.measure.stack import SHAPES, Shape, Stack
from tpfuse.testing import interpreted

TINY = Shape(64, 128, 6, 6, 16)


def run(rank, world):
    torch._dynamo.reset()
    torch.manual_seed(rank)
    stack = Stack(TINY, 2, world, torch.float32, "cpu")
    runner = Runner(stack, dist.group.WORLD, [Variant(PLAIN), Variant("tpfuse", Config(strict=True)), Variant(ROOM, None, False)])
    found = []
    with interpreted():
        for tokens, cached in ((6, 8), (7, None)):
            outputs = {name: step(0) for name, step in runner.steps(tokens, cached).items()}
            torch.testing.assert_close(outputs["tpfuse"], outputs[PLAIN], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(outputs[ROOM], outputs[PLAIN], rtol=1e-2)
            found.append(runner.calls["tpfuse"].report.counts())
    return found


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_every_variant_is_the_same_model_and_all_of_it_fuses(ranks):
    for counts in ranks.run(run, timeout=110):
        assert counts == [{"all_reduce_add_rms_norm": 4 * n} for n in (1, 2)]


def test_shapes_are_shared_only_by_ranks_that_divide_them():
    assert all(shape.check(world) is None for shape in SHAPES.values() for world in (2, 4, 8))
    assert SHAPES["8b"].check(3) == "intermediate = 14336 is no multiple of 3"


def test_the_room_that_is_closed():
    rows = [{"impl": PLAIN, "us": 100.0}, {"impl": "tpfuse", "us": 70.0}, {"impl": ROOM, "us": 50.0}]
    assert closed(rows) == {"tpfuse": 0.6}
