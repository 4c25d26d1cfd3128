"""The whole pipeline on CUDA tensors with real Inductor, reference bodies over gloo: graphs as CUDA builds of torch make them.

Ranks share a GPU where there are fewer GPUs than ranks, which NCCL refuses and gloo does not mind.
"""

import pytest
import torch
import torch.distributed as dist

import tpfuse
from tests.gpu.ranks import use_gpu
from tests.models import Stack


def run_stack(rank, world, dtype, options):
    device = use_gpu(rank)
    torch._dynamo.reset()
    model = Stack(hidden=256, layers=3, rank=rank).to(device, dtype)
    compiled = tpfuse.compile(model, {"kernels": "reference", **options}, dynamic=True, fullgraph=True)
    plain = torch.compile(Stack(hidden=256, layers=3, rank=rank).to(device, dtype), dynamic=True)  # the same weights: seeded
    exact = Stack(hidden=256, layers=3, rank=rank).to(device, torch.float64)
    exact.load_state_dict(model.state_dict())
    errors = []
    with torch.no_grad():
        for tokens in (24, 37, 1):
            torch.manual_seed(tokens)
            x = torch.randn(tokens, 256, device=device, dtype=dtype) * 1e-2
            want = exact(x.double())
            errors.append([((f(x).double() - want).norm() / want.norm()).item() for f in (compiled, plain)])
    every = [None] * world
    dist.all_gather_object(every, [r.ops for r in compiled.report.results])
    return compiled.report.counts(compiled.report.ranges[0]), errors, every


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"ranges": (32,)}], ids=["one", "two"])
def test_stack_on_cuda(ranks, dtype, options):
    for counts, errors, every in ranks.run(run_stack, dtype, options, timeout=280):
        assert counts == {"all_reduce_add_rms_norm": 6}
        assert all(fused <= 1.25 * plain for fused, plain in errors), errors
        assert all(ops == every[0] for ops in every)


def test_norms_stay_visible_to_raising_in_torch_of_this_machine():
    from tpfuse.testing import interpreted

    with torch.no_grad(), interpreted():
        report = tpfuse.explain(torch.nn.RMSNorm(64).cuda().bfloat16(), torch.randn(3, 64, device="cuda", dtype=torch.bfloat16))
    assert [e.attributes["operator"] for e in report.declined()] == ["rms_norm"]
