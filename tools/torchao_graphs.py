"""Write the graphs of torchao's FP8 linears as text, as Inductor is given them: fixtures of tests/raising/test_graphs.py.

    python tools/torchao_graphs.py tests/raising/graphs      # on a GPU of sm_89 or later, with torchao installed

One file a model and configuration: a line with what made it, one for each input (name, dtype, sizes, strides), the code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

HIDDEN, INNER = 256, 512


class Mlp(nn.Module):
    """Residual, norm, gated MLP: what a decoder layer does after its attention, without a collective."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        wide = h.float()
        y = self.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
        return self.down(nn.functional.silu(self.gate(y)) * self.up(y)), h


def configurations() -> dict[str, Any]:
    from torchao.prototype.quantization.quant_api import Float8StaticActivationFloat8WeightConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor

    dynamic = Float8DynamicActivationFloat8WeightConfig
    return {
        "fp8_tensor_dynamic": lambda: dynamic(granularity=PerTensor()),
        "fp8_token": lambda: dynamic(granularity=PerRow()),
        "fp8_tensor_static": lambda: Float8StaticActivationFloat8WeightConfig(
            act_quant_scale=torch.full((1, 1), 0.03, device=_device()), granularity=PerTensor()
        ),
    }


def capture(model: Callable[..., Any], args: list[Tensor]) -> fx.GraphModule:
    """The graph that Inductor would compile, tokens dynamic."""
    from torch._inductor.compile_fx import compile_fx

    found: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        found.append(gm)
        run = fx.Interpreter(gm)

        def call(real: list[Any]) -> Any:
            return run.run(*real)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    torch._dynamo.reset()
    for x in args:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(model, backend=lambda gm, ins: compile_fx(gm, ins, inner_compile=inner), fullgraph=True)(*args)
    (graph,) = found
    return graph


def text(gm: fx.GraphModule, title: str) -> str:
    lines = [f"# {title}"]
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, Tensor):
            sizes, strides = (",".join(map(str, s)) or "-" for s in (value.shape, value.stride()))
            lines.append(f"# {node.name} {str(value.dtype).removeprefix('torch.')} {sizes} {strides}")
        else:
            lines.append(f"# {node.name} int {value} -")
    return "\n".join(lines) + "\n" + gm.graph.python_code("self").src.strip() + "\n"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(folder: Path) -> None:
    import torchao
    from torchao.quantization import quantize_

    folder.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for name, config in configurations().items():
        torch.manual_seed(0)
        model = Mlp().to(_device(), torch.bfloat16)
        try:
            quantize_(model, config())
            args = [torch.randn(24, HIDDEN, device=_device(), dtype=torch.bfloat16) for _ in range(2)]
            graph = capture(model, args)
        except Exception as error:  # a configuration that this torchao or this device lacks is said, the others are written
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        title = f"{name}, torch {torch.__version__}, torchao {torchao.__version__}, {machine}"
        path = folder / f"{name}-torch{'.'.join(torch.__version__.split('.')[:2])}-{_device()}.txt"
        path.write_text(text(graph, title))
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
