"""A hand-written tensor-parallel transformer, small and without dependencies, for tests of the pipeline."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import nn


class Norm(nn.Module):
    """As Llama's in transformers: normalise in FP32, cast, then the weight."""

    def __init__(self, hidden, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    def __init__(self, hidden, group):
        super().__init__()
        self.group = group
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)
        self.first, self.out = nn.Linear(hidden, 2 * hidden, bias=False), nn.Linear(2 * hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 2 * hidden, bias=False), nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x):
        x = x + collectives.all_reduce(self.out(torch.tanh(self.first(self.norm1(x)))), "sum", self.group)
        return x + collectives.all_reduce(self.down(nn.functional.silu(self.up(self.norm2(x)))), "sum", self.group)


class Stack(nn.Module):
    """`layers` blocks and a final norm: 2 · layers all-reduces, each followed by residual and norm.

    Every rank holds its own share of the projections: give each another seed with `rank`.
    """

    def __init__(self, hidden=32, layers=3, group=None, rank=0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(hidden, group or dist.group.WORLD) for _ in range(layers))
        self.norm = Norm(hidden)
        torch.manual_seed(100 + rank)
        for block in self.layers:
            for linear in (block.first, block.out, block.up, block.down):
                linear.reset_parameters()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
