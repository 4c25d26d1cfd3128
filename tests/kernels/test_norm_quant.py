"""The one-GPU norm and activation kernels in Triton's interpreter, FP32 (see test_allreduce_norm.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.interpreted import INTERPRET
from tests.kernels.spawned import run_spawned
from tests.kernels.test_allreduce_norm import SCHEMES, check_quantised, fitting, normalised
from tpfuse.ir.samples import rows, vector

SIZES = [(5, 200), (2, 4112)]  # 4112 columns are three blocks of the activation kernel


class Given:
    """What `check_quantised` asks of a call."""

    def __init__(self, scale: torch.Tensor | None, scheme: str, layout: str) -> None:
        self.scale, self.scheme, self.layout = scale, scheme, layout


def run_norms(rank: int, world: int) -> int:
    from tpfuse.kernels import norm_quant

    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    done = 0
    for scheme, layout in SCHEMES[1:]:
        for seed, (tokens, hidden) in enumerate(fitting((scheme, layout), SIZES)):
            shape: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "seed": seed}
            x, residual, weight = rows(**shape), rows(**{**shape, "seed": 9}), vector(**shape)
            size = {"fp8_tensor": 0.05, "nvfp4": 30.0}.get(scheme.partition(":")[0])
            scale = None if size is None else torch.tensor([1 / size if ":" in scheme else size])
            given = Given(scale, scheme, layout)
            args = (weight, scale, 3e-6, 1.0, "cast_last", scheme, layout)
            for alive in ((True, True, True, True), (True, True, False, False)):
                q, scales, norm, h = norm_quant.add_rms_norm_quantize(x, residual, *args, alive=alive)
                want = normalised(x.double() + residual, weight, 3e-6, 1.0)
                check_quantised(q, scales, want, given)
                if alive[2]:
                    torch.testing.assert_close(norm.double(), want, rtol=2e-5, atol=1e-6)
                    torch.testing.assert_close(h, x + residual)
            q, scales, norm = norm_quant.rms_norm_quantize(x, *args, alive=(True, True, True))
            want = normalised(x.double(), weight, 3e-6, 1.0)
            check_quantised(q, scales, want, given)
            torch.testing.assert_close(norm.double(), want, rtol=2e-5, atol=1e-6)
            done += 1
    x = rows(tokens=4, hidden=200)
    arguments = (x, None, None, 3e-6, 0.0, "cast_first", "fp8_token", "row")
    got = norm_quant.rms_norm_quantize(*arguments, alive=(False, False, True))[2].double()
    torch.testing.assert_close(got, normalised(x.double(), None, 3e-6, 0.0), rtol=2e-5, atol=1e-6)
    return done


def run_activations(rank: int, world: int) -> int:
    from tpfuse.kernels import norm_quant

    torch.use_deterministic_algorithms(True)
    done = 0
    for scheme, layout in SCHEMES[1:]:
        for seed, (tokens, width) in enumerate(fitting((scheme, layout), SIZES)):
            both = rows(tokens=tokens, hidden=2 * width, seed=seed) * 700
            gate, up = both.chunk(2, -1)  # views of one matrix, as engines pass them
            size = {"fp8_tensor": 0.05, "nvfp4": 30.0}.get(scheme.partition(":")[0])
            scale = None if size is None else torch.tensor([1 / size if ":" in scheme else size])
            act = "silu" if seed % 2 else "gelu_tanh"
            q, scales, out = norm_quant.act_and_mul_quantize(gate, up, scale, act, scheme, layout, alive=(True, True, True))
            g = gate.double()
            activated = torch.nn.functional.silu(g) if act == "silu" else torch.nn.functional.gelu(g, approximate="tanh")
            want = activated * up.double()
            torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=1e-6)
            check_quantised(q, scales, want, Given(scale, scheme, layout))
            done += 1
    return done


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("run", [run_norms, run_activations])
def test_every_scheme_and_size(run: Any) -> None:
    count = sum(len(fitting(scheme, SIZES)) for scheme in SCHEMES[1:])
    assert run_spawned(run, 1, environment=INTERPRET, timeout=280) == [count]
