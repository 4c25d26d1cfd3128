"""The launcher, with harmless functions: every way a rank can end, and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tpfuse.cli.launch import Place, RankError, launch, threads
from tpfuse.report import FusionError

pytestmark = pytest.mark.ranks


def greet(place, progress, word):
    progress("greeting", 1, 2)
    return f"{word} {place.rank} of {place.world}", os.environ["OMP_NUM_THREADS"]


def add_ranks(place, progress):
    place.join("cpu", 60)
    total = torch.tensor([float(place.rank + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return total.item()


def one_raises(place, progress, folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder, f"{place.rank}").write_text(f"{os.getpid()} {child.pid}")
    while len(list(Path(folder).iterdir())) < place.world:
        time.sleep(0.05)
    if place.rank == 1:
        raise KeyError("the shard is missing")
    time.sleep(600)


def one_dies(place, progress, how):
    progress("loading", 0, 1)
    if place.rank == 1:
        os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def peers_complain(place, progress):
    """Rank 0 dies; rank 1 fails for that reason, and says so."""
    place.join("cpu", 60)
    dist.barrier()
    if place.rank == 0:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def one_hangs(place, progress):
    progress("compiling decode", 0, 1)
    if place.rank == 1:
        time.sleep(600)
    return 0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_results_come_by_rank_and_progress_from_rank_0():
    seen = []
    results = launch(greet, 2, "rank", progress=lambda *told: seen.append(told))
    assert [r[0] for r in results] == ["rank 0 of 2", "rank 1 of 2"]
    assert results[0][1] == str(threads(2))
    assert seen == [("greeting", 1, 2)]


def test_ranks_form_a_group():
    assert launch(add_ranks, 3) == [6.0, 6.0, 6.0]


def test_a_rank_that_raises_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(RankError, match="rank 1: KeyError: 'the shard is missing'") as caught:
        launch(one_raises, 2, str(tmp_path))
    assert "one_raises" in caught.value.details
    pids = [int(p) for file in tmp_path.iterdir() for p in file.read_text().split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


@pytest.mark.parametrize(("how", "told"), [("exit", "died with exit code 3"), ("kill", "was ended by SIGKILL")])
def test_a_rank_that_dies_is_named(how, told):
    with pytest.raises(RankError, match=f"rank 1: the process {told} while loading"):
        launch(one_dies, 2, how)


def test_a_death_comes_before_the_complaints_about_it():
    with pytest.raises(RankError, match="rank 0: the process died with exit code 7"):
        launch(peers_complain, 2)


def test_a_hang_is_bounded_and_says_who_and_where():
    with pytest.raises(TimeoutError, match=r"from rank 1 \(compiling decode\)$"):
        launch(one_hangs, 2, silence=20)


def test_an_address_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = Place(0, 1, 0, 1, "127.0.0.1", taken.getsockname()[1])
        for name, value in place.environment().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(FusionError, match=rf"rank 0: 1 ranks did not meet at 127.0.0.1:{place.port}: .*in use"):
            place.join("cpu", 20)


def test_torchrun_is_recognised(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert Place.of_torchrun() == Place(3, 4, 1, 2, "host", 29500)
    monkeypatch.delenv("RANK")
    assert Place.of_torchrun() is None
