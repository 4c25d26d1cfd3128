"""Raising: every spelling of a collective, norm, quantisation, product … becomes one operator.  Exact; no hardware."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tpfuse.raising import adapter_table as _adapter_table  # noqa: F401  registers its entries, before anybody's own
from tpfuse.raising.activations import raise_activations
from tpfuse.raising.adapters import raise_adapted
from tpfuse.raising.attention import join_heads, raise_attention
from tpfuse.raising.canonical import canonicalise, hoist_views, join_quantised
from tpfuse.raising.collectives import raise_collectives
from tpfuse.raising.matmuls import raise_matmuls
from tpfuse.raising.norms import raise_norms
from tpfuse.raising.opaque import name_opaque_collectives
from tpfuse.raising.quants import raise_quants
from tpfuse.raising.rope import raise_rotary
from tpfuse.raising.scaled_matmuls import raise_scaled_matmuls
from tpfuse.report import Event

Step = Callable[[fx.Graph], list[Event]]

STEPS: list[Step] = [
    canonicalise,
    raise_collectives,
    name_opaque_collectives,
    hoist_views,
    raise_norms,
    raise_rotary,
    raise_activations,
    join_heads,
    raise_quants,
    raise_adapted,
    raise_scaled_matmuls,
    join_quantised,
    raise_attention,
    raise_matmuls,
]


def raise_graph(graph: fx.Graph) -> list[Event]:
    """Raise a post-AOT graph in place.  Returns what looked like a site and was declined, each with its reason."""
    return [event for step in STEPS for event in step(graph)]
