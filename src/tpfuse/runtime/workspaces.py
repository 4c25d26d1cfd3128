"""`prepare`, `release` and `restore` of the kernels' workspaces, watched for peers that never come."""

from __future__ import annotations

from typing import Any

from .watchdog import Watchdog

_watchdog: Watchdog | None = None


def prepare(group: Any, max_tokens: int, hidden: int, *args: Any, **kwargs: Any) -> Any:
    """See `tpfuse.kernels.workspace.prepare`.  From now on a lost peer ends the process with a named error."""
    from tpfuse.kernels import workspace

    global _watchdog
    made = workspace.prepare(group, max_tokens, hidden, *args, **kwargs)
    if _watchdog is None:
        _watchdog = Watchdog(workspace.lost_peers)
        _watchdog.start()
    return made


def release(group: Any) -> None:
    """Give the receive buffers back on all ranks; captured graphs are valid again after `restore`."""
    from tpfuse.kernels import workspace

    workspace.release(group)


def restore(group: Any) -> None:
    """Allocate and exchange the receive buffers again."""
    from tpfuse.kernels import workspace

    workspace.restore(group)
