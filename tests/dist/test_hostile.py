"""Residual chains that rows cannot be shared out of without care, every pass forced: values and strides are the model's.

A model is a function of (x, r, w, v, m, group, other): x differs from rank to rank, r, w and v are the same, m is a rank's own
weight; `other` is a second group of the same ranks.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

import tpfuse
from tpfuse.config import PASSES
from tpfuse.testing import interpreted

pytestmark = pytest.mark.timeout(300)
HIDDEN = 32


def reduced(x, group):
    return collectives.all_reduce(x, "sum", group)


def norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def next_layer(h, w, v, m, group):
    return norm(h + reduced(norm(h, w) @ m, group), v)


def mixed(rows):
    """A chain whose rows meet one another between its norms."""

    def model(x, r, w, v, m, group, other):
        h = rows(next_layer(r + reduced(x, group), w, v, m, group))
        return next_layer(h, v, w, m, group), h

    return model


def interleaved(x, r, w, v, m, group, other):
    a, b = r + reduced(x, group), r * 2 + reduced(x * 3, other)
    return next_layer(b, w, v, m, other) @ m, next_layer(a, v, w, m, group)


def crossed(x, r, w, v, m, group, other):
    a, b = r + reduced(x, group), r * 2 + reduced(x * 3, group)
    return norm(b + reduced(norm(a, w) @ m, group), v), norm(a + reduced(norm(b, v) @ m, other), w)


def batch_of_two(x, r, w, v, m, group, other):
    x, r = x.view(2, -1, HIDDEN), r.view(2, -1, HIDDEN)
    return next_layer(r + reduced(x, group), w, v, m, group)


def tokens_before_batch(x, r, w, v, m, group, other):
    x, r = (t.view(2, -1, HIDDEN).transpose(0, 1) for t in (x, r))
    h = r + reduced(x, group)
    return next_layer(h, w, v, m, group), h


def columns_of_rows(x, r, w, v, m, group, other):
    h = r.t().contiguous().t() + reduced(x, group)
    h = h + reduced(norm(h, w) @ m, group)
    return norm(h, v), h


def own_residual(x, r, w, v, m, group, other):
    return next_layer(r + reduced(x, group) + x @ m, w, v, m, group)


def narrower(x, r, w, v, m, group, other):
    h = r + reduced(x, group)
    return norm(h[:, :16] + reduced((norm(h, w) @ m)[:, :16], group), v[:16])


def weight_of_rows(x, r, w, v, m, group, other):
    h = r + reduced(x, group)
    return next_layer(h, h[0], h.mean(0), m, group)


def biases_beside_a_merged_sum(x, r, w, v, m, group, other):
    return next_layer(r + ((reduced(x @ m, group) + w + v) + reduced(x, group)), w, v, m, group)


def written_residual(x, r, w, v, m, group, other):
    r.add_(reduced(x, group))
    y = norm(r, w)
    r.add_(reduced(y @ m, group))
    return norm(r, v), r.clone()[1:]


MODELS = {
    "reversed": mixed(lambda h: h.flip(0)), "moved on": mixed(lambda h: torch.cat([h[1:], h[:1]])),
    "mean of rows": mixed(lambda h: h - h.mean(0, keepdim=True)), "running sum": mixed(lambda h: h.cumsum(0)),
    "row numbers": mixed(lambda h: h + torch.arange(h.shape[0])[:, None] * 0.1),
    "padded": mixed(lambda h: torch.nn.functional.pad(h, (0, 0, 1, 2))),
    "sum of a row": mixed(lambda h: h * h.sum(-1, keepdim=True)),
    **{f.__name__: f for f in (interleaved, crossed, batch_of_two, tokens_before_batch, columns_of_rows, own_residual, narrower,
                               weight_of_rows, biases_beside_a_merged_sum, written_residual)},
}  # fmt: skip


def inputs(rank, tokens):
    own, alike = torch.Generator().manual_seed(9 * tokens + rank), torch.Generator().manual_seed(tokens)
    x, r = (torch.randn(tokens, HIDDEN, generator=g) for g in (own, alike))
    w, v = (torch.rand(HIDDEN, generator=alike) * 1.5 + 0.25 for _ in range(2))
    return [x, r, w, v, torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(50 + rank)) * 0.2]


def wrong(rank, world, names):
    """What differs from the model, by model and token count; how often a pass fired."""
    group, other = dist.group.WORLD.group_name, dist.new_group(list(range(world))).group_name
    found, fired = [], 0
    with torch.no_grad(), interpreted():
        for name in names:
            torch._dynamo.reset()
            compiled = tpfuse.compile(MODELS[name], {"passes": PASSES}, dynamic=True, fullgraph=True)
            for tokens in (12, 8):
                ours, theirs = inputs(rank, tokens), inputs(rank, tokens)
                got, want = compiled(*ours, group, other), MODELS[name](*theirs, group, other)
                got, want = (v if isinstance(v, tuple) else (v,) for v in (got, want))
                for a, b in zip([*got, *ours], [*want, *theirs], strict=True):
                    if a.shape != b.shape or a.stride() != b.stride() or not torch.allclose(a, b, rtol=1e-4, atol=1e-4):
                        found.append((name, tokens))
            fired += len(compiled.report.fired())
    return found, fired


def test_models(ranks):
    for found, fired in ranks.run(wrong, list(MODELS), timeout=280):
        assert found == [] and fired > 20
