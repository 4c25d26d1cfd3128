"""The operators, one family a module.  Importing this package declares them all."""

from tpfuse.ir import activation, attention, collective, fused, matmul, norm, overlap, quant, rope, shard
from tpfuse.ir.op import Kernel, Op, find, op, registry

__all__ = [
    "Kernel", "Op", "activation", "attention", "collective", "find", "fused", "matmul", "norm", "op", "overlap", "quant",
    "registry", "rope", "shard",
]  # fmt: skip
