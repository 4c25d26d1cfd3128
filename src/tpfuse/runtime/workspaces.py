"""`prepare`, `release` and `restore` of the kernels' workspaces, watched for peers that never come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .watchdog import Watchdog

_watchdog: Watchdog | None = None


def prepare(
    group: Any, max_tokens: int, hidden: int, dtypes: Sequence[torch.dtype] = (torch.bfloat16,), *, channels: int = 3,
    concurrency: int = 1, timeout: float = 60.0,
) -> Any:  # fmt: skip
    """Make, or enlarge, the memory that tpfuse's own kernels exchange rows through.  GPUs only; all ranks of the group call it
    alike, never inside graph capture.  Compiled models do it themselves; direct calls of `tpfuse.ops` need it once before.

    group: a ProcessGroup, a DeviceMesh of one dimension or a name, of 2 to 8 ranks.  max_tokens, hidden, dtypes: the largest
    call; more tokens go in several launches, wider rows are an error.  channels: streams that call collectives of this group,
    graph capture's own counted.  concurrency: how many of them run at the same time; each gets its share of the multiprocessors.
    timeout: seconds that a rank waits for its peers, here and in every kernel: from now on a peer that does not come ends the
    process with exit code 70 and an error that names it.

    Raises FusionError, with the ranks named, where one does not come in time or asks for something else.
    """
    from tpfuse.kernels import workspace

    made = workspace.prepare(
        group, max_tokens, hidden, dtypes, channels=channels, concurrency=concurrency, timeout=timeout
    )
    _watch()
    return made


def prepare_scatter(group: Any, max_tokens: int, hidden: int, *args: Any, **kwargs: Any) -> Any:
    """The region of products before a reduce-scatter; see `tpfuse.kernels.regions.prepare`."""
    from tpfuse.kernels import regions

    made = regions.prepare(regions.SCATTER, group, max_tokens, hidden, *args, **kwargs)
    _watch()
    return made


def prepare_gather(group: Any, max_tokens: int, hidden: int, *args: Any, **kwargs: Any) -> Any:
    """The region of products behind an all-gather; see `tpfuse.kernels.regions.prepare`."""
    from tpfuse.kernels import regions

    made = regions.prepare(regions.GATHER, group, max_tokens, hidden, *args, **kwargs)
    _watch()
    return made


def release(group: Any) -> None:
    """Give the receive buffers and regions of a group back, on all its ranks alike, to use the memory for something else.  After
    `restore` captured graphs are valid again, but for those with products next to collectives.

    group: as for `prepare`.  Raises FusionError where nothing was prepared, or a rank does not come in time."""
    from tpfuse.kernels import regions, workspace

    if not regions.release(group) or workspace.is_prepared(group):
        workspace.release(group)


def restore(group: Any) -> None:
    """Allocate and exchange what `release` gave back again, on all ranks of the group alike; nothing where it is there.

    group: as for `prepare`.  Raises FusionError where nothing was prepared, or a rank does not come in time."""
    from tpfuse.kernels import regions, workspace

    if not regions.restore(group) or workspace.is_prepared(group):
        workspace.restore(group)


def _watch() -> None:
    from tpfuse.kernels import regions, workspace

    global _watchdog
    if _watchdog is None:
        _watchdog = Watchdog(lambda: [*workspace.lost_peers(), *regions.lost_peers()])
        _watchdog.start()
