"""Which processes stay for the next test."""

import os

import pytest

from tests.kernels.spawned import run_spawned


def process(rank: int, world: int) -> int:
    return os.getpid()


def test_kept_processes_end_when_others_are_started() -> None:
    first = run_spawned(process, 1, environment={"TPFUSE_KEPT": "1"}, keep=True)
    assert run_spawned(process, 1, environment={"TPFUSE_KEPT": "1"}, keep=True) == first
    assert run_spawned(process, 1, environment={}) != first
    with pytest.raises(ProcessLookupError):
        os.kill(first[0], 0)
