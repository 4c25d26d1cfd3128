"""IR to IR: chains of operators become fused ones."""

from tpfuse.fusion.composites import fuse

__all__ = ["fuse"]
