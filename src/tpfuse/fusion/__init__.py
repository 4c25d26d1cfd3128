"""IR to IR: chains of operators become fused ones."""

from collections.abc import Iterable

from torch import fx

from tpfuse.fusion import composites, merge
from tpfuse.report import Event

__all__ = ["fuse"]


def fuse(graph: fx.Graph, passes: Iterable[str], fuel: composites.Fuel = lambda: True) -> list[Event]:
    """Run the passes named in `passes`, in the order that lets each see what the earlier ones made.  Fired and declined sites."""
    passes = tuple(passes)
    events = merge.merge_all_reduces(graph, fuel) if merge.PASS in passes else []
    return [*events, *composites.fuse(graph, passes, fuel)]
