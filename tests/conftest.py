"""Settings of every test.  Kernels run in Triton's interpreter only where a test asks for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: several ranks share the cores, and results must not depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from tpfuse.testing import RankPool, interpreted  # noqa: E402

TESTS = Path(__file__).parent
torch.set_num_threads(1)

with contextlib.suppress(ImportError):  # the GPU tests run where only torch and pytest are installed
    import hypothesis

    # Compilation and loaded machines make single examples slow: the time-out of the whole test bounds them.
    hypothesis.settings.register_profile("tpfuse", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("tpfuse")


@pytest.fixture(scope="session", params=[2, 3], ids="world{}".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """A pool of gloo ranks, kept over the whole session: `ranks.run(fn, *args)`.

    Runs the test once on two ranks and once on three; other sizes by
    `@pytest.mark.parametrize("ranks", [4], indirect=True)`.
    """
    with RankPool(request.param) as pool:
        yield pool


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "dist" or "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ranks)
        if folder == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def group() -> Iterator[str]:
    """The name of a process group of two ranks, of which this process is the first and the other does not exist: its
    collectives move nothing.  Enough for graphs; values over ranks are tested where there are ranks."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process alone in a gloo group, nothing compiled before, gradients off."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    dist.destroy_process_group()


@pytest.fixture
def interpreted_rank(one_rank: None) -> Iterator[None]:
    """The same, final graphs interpreted and not given to Inductor."""
    with interpreted():
        yield
