"""`prepare`, `release` and `restore` of the kernels' workspaces, watched for peers that never come."""

from __future__ import annotations

from typing import Any

from .watchdog import Watchdog

_watchdog: Watchdog | None = None


def prepare(group: Any, max_tokens: int, hidden: int, *args: Any, **kwargs: Any) -> Any:
    """See `tpfuse.kernels.workspace.prepare`.  From now on a lost peer ends the process with a named error."""
    from tpfuse.kernels import workspace

    made = workspace.prepare(group, max_tokens, hidden, *args, **kwargs)
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
    """Give the receive buffers and regions back on all ranks.  After `restore` captured graphs are valid again, but for those
    with products next to collectives."""
    from tpfuse.kernels import regions, workspace

    if not regions.release(group) or workspace.is_prepared(group):
        workspace.release(group)


def restore(group: Any) -> None:
    """Allocate and exchange the receive buffers and regions again."""
    from tpfuse.kernels import regions, workspace

    if not regions.restore(group) or workspace.is_prepared(group):
        workspace.restore(group)


def _watch() -> None:
    from tpfuse.kernels import regions, workspace

    global _watchdog
    if _watchdog is None:
        _watchdog = Watchdog(lambda: [*workspace.lost_peers(), *regions.lost_peers()])
        _watchdog.start()
