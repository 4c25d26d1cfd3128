"""The multi-rank harness: results, failures, deaths, hangs, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tpfuse.testing import RankPool, run_ranks

pytestmark = pytest.mark.ranks


def reduce_partials(rank, world, scale):
    x = torch.full((3,), scale * (rank + 1.0))
    dist.all_reduce(x)
    return x, os.getpid(), torch.get_num_threads()


def reduce_in_subgroup(rank, world):
    groups = [dist.new_group([0, 1]), dist.new_group([1, 2])]
    x = torch.tensor([10.0**rank])
    if rank < 2:
        dist.all_reduce(x, group=groups[0])
    return x.item()


def fail_on_one(rank, world):
    if rank == 1:
        raise KeyError("lost weight")
    dist.all_reduce(torch.ones(1))  # waits for rank 1 for ever


class OddError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail_oddly(rank, world):
    raise OddError("this", "that")


def die_on_one(rank, world):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def hang_on_zero(rank, world):
    if rank == 0:
        time.sleep(1000)


def draw(rank, world):
    return torch.rand(4)


def compiled_frames(rank, world):
    torch._dynamo.utils.counters.clear()
    result = torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    return result.sum().item(), torch._dynamo.utils.counters["frames"]["ok"]


def read_environment(rank, world):
    return os.environ.get("TPFUSE_TEST_MARK"), os.environ["RANK"], os.environ["WORLD_SIZE"]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_takes_part(world):
    results = run_ranks(reduce_partials, world, 0.5)
    expected = torch.full((3,), 0.5 * world * (world + 1) / 2)
    assert all(torch.equal(x, expected) for x, _, _ in results)
    assert [threads for *_, threads in results] == [1] * world
    pids = {pid for _, pid, _ in results}
    assert len(pids) == world
    assert os.getpid() not in pids
    assert not any(map(is_alive, pids))


@pytest.fixture(scope="module")
def pool():
    with RankPool(3) as pool:
        yield pool


def test_pool_keeps_its_processes(pool):
    first, second = pool.run(reduce_partials, 1.0), pool.run(reduce_partials, 2.0)
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in second]
    assert second[0][0].tolist() == [12.0] * 3


def test_subgroups(pool):
    assert pool.run(reduce_in_subgroup) == [11.0, 11.0, 100.0]


def test_calls_start_alike(pool):
    first, second = pool.run(draw), pool.run(draw)
    assert all(torch.equal(x, first[0]) for x in first + second)
    assert pool.run(compiled_frames) == pool.run(compiled_frames) == [(2.0, 1)] * 3


def test_environment_is_that_of_the_call(pool, monkeypatch):
    monkeypatch.setenv("TPFUSE_TEST_MARK", "seen")
    assert pool.run(read_environment) == [("seen", str(rank), "3") for rank in range(3)]
    monkeypatch.delenv("TPFUSE_TEST_MARK")
    assert pool.run(read_environment)[0][0] is None


def test_first_failure_is_raised_soon_and_pool_recovers(pool):
    before = pool.run(reduce_partials, 1.0)
    start = time.monotonic()
    with pytest.raises(KeyError, match="lost weight") as caught:
        pool.run(fail_on_one)
    assert time.monotonic() - start < 5
    assert "on rank 1:" in caught.value.__notes__[0]
    assert "fail_on_one" in caught.value.__notes__[0]
    assert not any(is_alive(pid) for _, pid, _ in before)
    assert pool.run(reduce_partials, 1.0)[0][0].tolist() == [6.0] * 3


def test_exception_that_does_not_travel(pool):
    with pytest.raises(RuntimeError, match="(?s)on rank .*fail_oddly.*OddError: this and that"):
        pool.run(fail_oddly)


def test_death_is_named(pool):
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match="rank 1 died with exit code -9"):
        pool.run(die_on_one)
    assert time.monotonic() - start < 30


def test_hang_shows_the_stack(pool):
    pids = [pid for _, pid, _ in pool.run(reduce_partials, 1.0)]
    with pytest.raises(TimeoutError, match="(?s)rank 0 had not finished:.*hang_on_zero"):
        pool.run(hang_on_zero, timeout=1)
    assert not any(map(is_alive, pids))


def test_ranks_end_with_their_parent(tmp_path):
    """A parent that is killed outright takes its ranks along."""
    script = tmp_path / "parent.py"
    script.write_text(
        "from tests.test_testing import reduce_partials, hang_on_zero\n"
        "from tpfuse.testing import RankPool\n"
        "if __name__ == '__main__':\n"
        "    pool = RankPool(2)\n"
        "    print(*[pid for _, pid, _ in pool.run(reduce_partials, 1.0)], flush=True)\n"
        "    pool.run(hang_on_zero)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).parent.parent
    command = [sys.executable, script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


def test_ranks_fixture(ranks):
    results = ranks.run(reduce_partials, 1.0)
    assert len(results) == ranks.world
    assert ranks.world in (2, 3)
