"""Attention whose rows are quantised, in the forms that torch leaves in graphs, raised bit for bit and fused."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import tests.raising.test_quants as spelled
from tests.raising.capture import Raised, raise_exactly, trace
from tpfuse.fusion import fuse
from tpfuse.ir import find, verify
from tpfuse.raising import raise_graph
from tpfuse.report import Event

aten = torch.ops.aten
TOKENS = 24
GROUPED, LATENT = (4, 2, 16, 16), (4, 4, 24, 12)  # heads, key heads, their width, that of values


def fp8(x: Tensor) -> Tensor:
    return (x.float() / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(1, x.shape[0], count, -1).transpose(1, 2)


def repeated(x: Tensor, times: int) -> Tensor:
    """As transformers repeats the heads of keys and values."""
    batch, count, tokens, width = x.shape
    return x.unsqueeze(2).expand(batch, count, times, tokens, width).reshape(batch, count * times, tokens, width)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = (repeated(x, times) if times > 1 else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = (repeated(x, times) if times > 1 else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = (repeated(x, times) if times > 1 else x for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = scores if mask is None else scores + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def flash_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.3)[0]


def efficient_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    k, v = (repeated(x, q.shape[1] // k.shape[1]) for x in (k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask.expand(1, 4, -1, -1), False, scale=0.3)[0]


def cudnn_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True)[0]


def model(
    attend: Callable[..., Tensor],
    shape: tuple[int, ...],
    quantise: Callable[..., Any] = fp8,
    masked: bool = True,
    flat: bool = True,
) -> Callable[..., Any]:
    count, key_count, *_ = shape

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        out = attend(
            heads(q, count), heads(k, key_count), heads(v, key_count), mask.unsqueeze(0).unsqueeze(0) if masked else None
        )
        out = out.transpose(1, 2).contiguous().reshape(1, q.shape[0], -1)
        return quantise(out.view(q.shape[0], -1) if flat else out)

    return call


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> list[Tensor]:
    count, key_count, width, value_width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (count * width, key_count * width, key_count * value_width)
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
    return [x.to(device, dtype) for x in (*(torch.randn(TOKENS, n, generator=generator) for n in sizes), mask)]


def raised(fn: Callable[..., Any], args: list[Tensor], dynamic: int | None = None, math: bool = False) -> Raised:
    with sdpa_kernel(SDPBackend.MATH) if math else nullcontext():
        return raise_exactly(*trace(fn, args, dynamic))


# name: attention, shape, masked, by torch's decomposition, method
FORMS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], bool, bool, str]] = {
    "flash_cpu": (sdpa, GROUPED, True, False, "flash_cpu+repeat"),
    "flash_cpu_causal": (causal, GROUPED, False, False, "flash_cpu+repeat"),
    "math": (sdpa, GROUPED, True, True, "math+repeat"),
    "math_unmasked": (sdpa, GROUPED, False, True, "math+repeat"),
    "math_causal": (causal, GROUPED, False, True, "math+repeat"),
    "math_grouped": (grouped, GROUPED, True, True, "math+repeat"),
    "latent": (sdpa, LATENT, True, False, "math"),
    "latent_causal": (causal, LATENT, False, False, "math"),
    "eager": (eager, GROUPED, True, False, "eager+repeat"),
    "eager_latent": (eager, LATENT, False, False, "eager"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, dtype: torch.dtype) -> None:
    attend, shape, masked, math, method = FORMS[form]
    # The mask's own shape is dynamic only where the model makes it.
    found = raised(model(attend, shape, masked=masked), inputs(shape, dtype), None if masked else 0, math)
    assert [name for name, _ in found.calls] == ["attention", "quantize"] and not found.events
    (args,) = found.named("attention")
    assert args["method"] == method and args["causal"] == (form == "flash_cpu_causal")
    assert (args["mask"] is not None) == (masked or form in ("math_causal", "latent_causal"))
    scale = shape[2] ** -0.5 if attend is causal else 0.3
    assert args["softmax_scale"] == pytest.approx(scale, rel=1e-12)
    assert args["k"].meta["val"].shape[1] == shape[1] and args["v"].meta["val"].shape[-1] == shape[3]


@pytest.mark.parametrize("attend", [flash_cuda, efficient_cuda, cudnn_cuda])
def test_cuda_forms(attend: Callable[..., Tensor]) -> None:
    """torch's CUDA operators, on tensors without memory: what a GPU's graph holds, never run."""
    gm = cuda_graph(model(attend, GROUPED), GROUPED)
    events = raise_graph(gm.graph)
    calls = [(op.name, op.bind(n.args)) for n in gm.graph.nodes if (op := find(n.target))]
    assert [name for name, _ in calls] == ["attention", "quantize"] and not events
    args = calls[0][1]
    name = attend.__name__.removesuffix("_cuda")
    assert args["method"] == (f"{name}+repeat" if attend is efficient_cuda else name)
    assert args["causal"] == (attend is not efficient_cuda) and args["k"].meta["val"].shape[1] == 2
    assert args["softmax_scale"] == (0.25 if attend is cudnn_cuda else 0.3)
    fuse(gm.graph, ["attention_quantize"])
    verify.verify(gm.graph, "fuse")
    assert [op.name for n in gm.graph.nodes if (op := find(n.target))] == ["attention_quantize"]


def cuda_graph(fn: Callable[..., Any], shape: tuple[int, ...]) -> fx.GraphModule:
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode() as mode, torch.no_grad():
        fakes = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in inputs(shape)]
        with mode:
            gm = make_fx(fn, decomposition_table=select_decomp_table())(*fakes)
    gm.graph.eliminate_dead_code()
    return gm


def soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.tanh(torch.matmul(q, repeated(k, 2).transpose(2, 3)) * 0.3 / 50) * 50 + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), repeated(v, 2))


def low_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The weights stay in FP32: another product than transformers'."""
    scores = torch.matmul(q, repeated(k, 2).transpose(2, 3)) * 0.3 + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32), repeated(v, 2).float()).to(q.dtype)


def dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (repeated(x, 2) for x in (k, v))
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.5)[0]


@pytest.mark.parametrize(
    ("attend", "reason"), [(soft_capped, "attention_form"), (low_softmax, "attention_form"), (dropped, "dropout")]
)
def test_other_attention(attend: Callable[..., Tensor], reason: str) -> None:
    gm, _ = trace(model(attend, GROUPED), inputs(GROUPED), None)
    events = raise_graph(gm.graph)
    assert [op.name for n in gm.graph.nodes if (op := find(n.target))] == ["quantize"]
    assert [(e.rule, e.reason.code) for e in events if e.reason] == [("attention_quantize", reason)]


def log_sum_exp(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(heads(q, 4), heads(q, 4), heads(q, 4), attn_mask=mask[None, None])
    return fp8(out.transpose(1, 2).reshape(TOKENS, -1)), lse


def returned_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    weights = F.softmax(torch.matmul(heads(q, 4), heads(q, 4).transpose(2, 3)) * 0.3, dim=-1, dtype=torch.float32).to(q.dtype)
    return fp8(torch.matmul(weights, heads(q, 4)).transpose(1, 2).reshape(TOKENS, -1)), weights


def heads_apart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    out = sdpa(heads(q, 4), heads(q, 4), heads(q, 4), None)
    return fp8(out.transpose(1, 2).reshape(TOKENS, -1)), out * 2


@pytest.mark.parametrize("fn", [log_sum_exp, returned_weights, heads_apart])
def test_second_user(fn: Callable[..., Any]) -> None:
    found = raised(fn, inputs(GROUPED))
    assert not found.named("attention") and found.reasons == ["second_user"]


def test_unquantised_attention_stays() -> None:
    assert not raised(model(sdpa, GROUPED, quantise=torch.tanh), inputs(GROUPED)).calls


def fused(fn: Callable[..., Any], args: list[Tensor], *passes: str) -> tuple[list[str], list[Event], fx.Graph]:
    """Raise and fuse; the result must be the model's, bit for bit."""
    gm, real = trace(fn, args, None)
    wanted = fx.Interpreter(gm).run(*real)
    raise_graph(gm.graph)
    events = fuse(gm.graph, passes or ["attention_quantize"])
    verify.verify(gm.graph, "fuse")
    for got, want in zip(fx.Interpreter(gm).run(*real), wanted, strict=True):
        bits = [x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in (got, want)]
        assert torch.equal(*bits) and got.stride() == want.stride()
    return [op.name for n in gm.graph.nodes if (op := find(n.target))], events, gm.graph


WIDE = (2, 2, 64, 128)  # heads of 128 values: whole groups
# name: quantisation, scheme, layout
SCHEMES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "static": (fp8, "fp8_tensor", "row"),
    "group 128": (spelled.grouped, "fp8_group128", "row"),
    "group 64": (lambda x: spelled.grouped(x, 64), "fp8_group64", "row"),
    # 24 rows are a multiple of four: columns are aligned as they are
    "column-major": (lambda x: spelled.grouped(x, view=spelled.columns), "fp8_group128", "col+tma"),
    "TMA-aligned": (lambda x: spelled.grouped(x, view=spelled.tma), "fp8_group128", "col+tma"),
    "UE8M0": (spelled.power_of_two, "fp8_group128", "row+ue8m0"),
    "NVFP4": (lambda x: spelled.nvfp4(x, None), "nvfp4", "linear"),
    "NVFP4, swizzled": (lambda x: spelled.nvfp4(x, None, True), "nvfp4", "swizzled_128x4"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_fused(name: str) -> None:
    quantise, scheme, layout = SCHEMES[name]
    names, (event,), _ = fused(model(sdpa, WIDE, quantise), [x / 8 for x in inputs(WIDE)])
    assert names == ["attention_quantize"] and event.status == "fired"
    assert (event.attributes["scheme"].split(":")[0], event.attributes["layout"]) == (scheme, layout)


def test_fused_batch() -> None:
    """Quantised before the batch is flattened, as transformers' layers hand it on."""
    names, _, _ = fused(model(sdpa, WIDE, flat=False), inputs(WIDE))
    assert names == ["attention_quantize"]


def test_both_results() -> None:
    """Rows that are read quantised and as they are: the operator returns both."""
    names, _, _ = fused(model(sdpa, GROUPED, lambda x: (fp8(x), x * 2)), inputs(GROUPED))
    assert names == ["attention_quantize"]


@pytest.mark.parametrize(
    ("shape", "quantise", "reason"),
    [((8, 8, 16, 32), lambda x: spelled.grouped(x, 64), "head_dim"), (WIDE, spelled.per_row, "scale_spans_heads")],
    ids=["group_over_heads", "token"],
)
def test_declined(shape: tuple[int, ...], quantise: Callable[..., Any], reason: str) -> None:
    names, events, _ = fused(model(sdpa, shape, quantise), inputs(shape))
    assert names == ["attention", "quantize"]
    assert [(e.rule, e.reason.code) for e in events if e.reason] == [("attention_quantize", reason)]


def test_pass_disabled() -> None:
    names, _, _ = fused(model(sdpa, GROUPED), inputs(GROUPED), "all_reduce_norm")
    assert names == ["attention", "quantize"]
