"""IR to IR: chains of operators become fused ones."""

from collections.abc import Iterable

from torch import fx

from tpfuse.fusion import attention, composites, delay, merge, scale, summands
from tpfuse.fusion.async_tp import async_tp
from tpfuse.fusion.composites import Worth
from tpfuse.fusion.sequence_parallel import Chain, Policy, sequence_parallel
from tpfuse.report import Event

__all__ = ["Chain", "Policy", "Worth", "fuse"]


MOVING = (delay.RULE, merge.PASS, summands.RULE, scale.RULE)  # rules behind which an all-reduce is one still
SUMS = (delay.delay, merge.merge_all_reduces, summands.regroup)  # what brings the all-reduces of a sum to its norm


def fuse(
    graph: fx.Graph,
    passes: Iterable[str],
    fuel: composites.Fuel = lambda: True,
    policy: Policy = lambda chain: None,
    worth: Worth = lambda op, args: None,
) -> list[Event]:
    """Run the passes named in `passes`, in the order that lets each see what the earlier ones made.  Fired and declined sites.

    policy: which residual chains are worth their sequence-parallel form; it wins a site before all-reduce + norm can.
    worth: which products are worth their fused form; where one is not, its collective goes with what else stands beside it.
    """
    passes = tuple(passes)
    steps = [
        (merge.PASS, lambda: [e for step in SUMS for e in step(graph, fuel)]),
        ("sequence_parallel", lambda: sequence_parallel(graph, policy, fuel)),
        ("async_tp", lambda: async_tp(graph, fuel, worth)),
        (scale.PASS, lambda: scale.hoist_scales(graph, fuel)),
        (attention.PASS, lambda: attention.fuse_engine_attention(graph, fuel)),
    ]
    events = [event for name, step in steps if name in passes for event in step()]
    moved = {event.node for event in events if event.status == "fired" and event.rule in MOVING}  # may miss their norms yet
    told = {event.node for event in events if event.node and event.node not in moved}
    rest = composites.fuse(graph, passes, fuel)
    return [*events, *(event for event in rest if event.status == "fired" or event.node not in told)]
