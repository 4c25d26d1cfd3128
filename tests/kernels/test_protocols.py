"""The protocols between ranks, in every interleaving where few steps make that possible, else in many by chance; and broken ones,
each of which must be seen to be."""

from __future__ import annotations

import re

import pytest

from tests.kernels.model import Broken, Programs, explore, wander
from tests.kernels.protocols import ORDER, PROTOCOLS, channel, turns
from tests.kernels.recorded import programs
from tpfuse.kernels.driver import FOLDER
from tpfuse.kernels.regions import GATHER, SCATTER

KERNELS = list(PROTOCOLS)
# Sizes that change from call to call: none, one, fewer rows than ranks, and more.
SIZES = (1, 3, 0, 2, 9, 1, 5, 0, 1, 2, 2)
MIXED = [
    (KERNELS[n % 5], tokens) for n, tokens in zip((0, 3, 2, 4, 1, 0, 2, 3, 4, 2, 1, 4, 0, 3), (*SIZES, 2, 1, 7), strict=True)
]  # fmt: skip
CALLS = {
    SCATTER: [("chunked", tokens) for tokens in (3, 1, 5, 2)],
    GATHER: [("push", 3), ("chunked", 1), ("push", 1), ("chunked", 5), ("chunked", 4)],
}  # fmt: skip


def is_seen(made: Programs, seeds: int = 150) -> bool:
    """Whether some interleaving by chance goes wrong."""
    for seed in range(seeds):
        try:
            wander(made, seed)
        except Broken:
            return True
    return False


@pytest.mark.parametrize("place", ORDER)
def test_kernels_do_what_the_model_says(place: str) -> None:
    """The steps that the model has, in the order of the source, and no more of them."""
    file, name = place.split(":")
    text = (FOLDER.parent / file).read_text()
    begin = re.search(rf"^\S.*\b{name}\(", text, re.MULTILINE)
    assert begin is not None
    body = re.split(r"^(?:\}|@|def |extern )", text[begin.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    body = re.sub(r"(?://|# ).*", "", body)
    steps = sorted(set(ORDER[place]), key=len, reverse=True)
    assert re.findall("|".join(map(re.escape, steps)), body) == ORDER[place]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_interleaving_of_two_ranks(kernel: str) -> None:
    assert explore(channel(2, [(kernel, tokens) for tokens in (1, 2, 0, 1)])) > 50


def test_every_interleaving_of_copies_beside_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explore(programs(monkeypatch, GATHER, 2, [("chunked", 2)] * 2, 40)) > 100


@pytest.mark.parametrize("grids", [(1,), (2,), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("world", [2, 3, 4, 5, 8])
def test_kernels_that_share_a_channel(world: int, grids: tuple[int, ...]) -> None:
    """In turns, and each alone; also where ranks have grids of different sizes."""
    for seed in range(max(2, 30 // world**2)):
        wander(channel(world, MIXED, grids), seed)
        for kernel in KERNELS:
            wander(channel(world, [(kernel, tokens) for tokens in SIZES[:7]], grids), seed)


BROKEN = (
    "a slot fewer", "an empty call takes a turn", "blocks of the next call start early", "emptied before it is read",
    "never emptied", "the next slot is emptied",
)  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_channel_is_seen(broken: str, kernel: str) -> None:
    calls = [(kernel, tokens) for tokens in (2, 0, 1, 0, 2, 1, 2, 1)]
    assert is_seen(channel(2, calls, broken=broken)) and is_seen(channel(3, calls, broken=broken))


def test_which_kernels_rely_on_a_resident_grid() -> None:
    """Where ranks have equal grids, blocks of the one-shots and of the sharded forms wait only for the block of their number on
    other ranks, so that the first ones can end; a block of the two-shot waits for any."""
    for kernel in KERNELS:
        made = channel(3, [(kernel, 12)] * 2, grids=(3,), resident=2)
        assert is_seen(made, 30) == (kernel == "two_shot"), kernel


def test_blocks_agree_on_the_slot() -> None:
    assert explore(turns(3, 4)) > 100
    for broken in ("counted in before it has read", "blocks of the next call start early"):
        with pytest.raises(Broken):
            explore(turns(3, 4, broken))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("max_tokens", [40, 4], ids=["one turn", "turns"])
@pytest.mark.parametrize("kind", CALLS)
def test_products_next_to_collectives(monkeypatch: pytest.MonkeyPatch, kind: str, max_tokens: int, world: int) -> None:
    made = programs(monkeypatch, kind, world, CALLS[kind], max_tokens)
    for seed in range(24 // world):
        wander(made, seed)


@pytest.mark.parametrize(
    "kind, broken, worlds",
    [
        (SCATTER, "no acquire", (2, 3)), (SCATTER, "a call too far ahead", (2, 3)), (SCATTER, "no wait for readers", (2, 3)),
        (SCATTER, "no wait for copies", (2, 3)), (SCATTER, "readers signal before they have read", (2, 3)),
        (SCATTER, "memory is given back before it is sent", (4, 8)),
        (GATHER, "a call too far ahead", (2, 3)), (GATHER, "no wait for readers", (2, 3)), (GATHER, "no wait for copies", (2, 3)),
        (GATHER, "no wait for what came", (2, 3)), (GATHER, "flags overtake rows", (2, 3)),
        (GATHER, "no fence before the count", (2, 3)),
    ],
)  # fmt: skip
def test_broken_products_are_seen(monkeypatch: pytest.MonkeyPatch, kind: str, broken: str, worlds: tuple[int, ...]) -> None:
    for world in worlds:
        assert is_seen(programs(monkeypatch, kind, world, CALLS[kind], 4, broken))
