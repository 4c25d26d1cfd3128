"""Reduce-scatter + norm + quantise + gather in one launch, ranks simulated on one GPU: worlds beyond the GPUs that are there."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_allreduce_norm import error, make_calls, reference, unfused
from tpfuse.formats import dequantize, quantize

pytest.importorskip("triton")
if torch.cuda.is_available():
    from tests.gpu.simulated import SimulatedRanks
    from tpfuse.kernels.cuda_sharded import ShardCall, sharded

SCHEMES = [("", ""), ("fp8_tensor", "row"), ("fp8_token", "row"), ("fp8_group128", "col+tma"), ("nvfp4", "swizzled_128x4")]


@pytest.mark.parametrize("world", [3, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES, ids=":".join)
def test_worlds(world: int, scheme: tuple[str, str]) -> None:
    ranks = SimulatedRanks(world, 160, 4096)
    for tokens, hidden in ((1, 4096), (world + 1, 1040), (130, 2048)):
        calls = make_calls(world, tokens, hidden, *scheme, seed=tokens)
        share = -(-tokens // world)
        shards = []
        for rank, call in enumerate(calls):
            assert call.residual is not None
            padded = torch.cat([call.residual, call.residual.new_zeros(share * world - tokens, hidden)])
            name = call.operator.replace("all_reduce", "reduce_scatter") + "_all_gather"
            known = {**vars(call), "operator": name, "residual": padded[rank * share : (rank + 1) * share].contiguous()}
            shards.append(ShardCall(**known, gather=True, all_rows=not call.scheme))
        outputs = ranks(sharded, shards)
        (norm, h), (plain_norm, plain_h) = reference(calls), unfused(calls)
        for rank, out in enumerate(outputs):
            own = slice(min(tokens, rank * share), min(tokens, (rank + 1) * share))
            count = own.stop - own.start
            if count:
                assert error(out.reduced[:count], h[own]) <= 1.25 * error(plain_h[own], h[own])
                assert error(out.own_norm[:count], norm[own]) <= 1.25 * error(plain_norm[own], norm[own])
            if scheme[0]:
                want_q, want_scales = quantize(plain_norm, calls[0].scale, *scheme)
                got = dequantize(out.q, out.scales, calls[0].scale, *scheme)
                assert error(got, norm) <= 1.25 * error(dequantize(want_q, want_scales, calls[0].scale, *scheme), norm)
            else:
                assert error(out.norm, norm) <= 1.25 * error(plain_norm, norm)
            assert torch.equal(out.q.view(torch.uint8), outputs[0].q.view(torch.uint8)) and torch.equal(out.norm, outputs[0].norm)
