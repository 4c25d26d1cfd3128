"""Each operator spelled in plain torch on FP64, written apart from the operators' own bodies.

`SPELLINGS[name](args, total)`: args by name, floating tensors in FP64; total(x) sums x over the ranks, total.parts(x) lists
them.  Gives the results in the operator's order; quantised results are given back as the values they stand for.
"""

from __future__ import annotations

import torch


def norm(x, weight, eps, weight_bias):
    y = x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
    return y if weight is None else y * (weight + weight_bias)


def reduce_norm(a, total):
    reduced = total(a["x"])
    if a["bias"] is not None:
        reduced = reduced + a["bias"]
    return norm(reduced, a["weight"], a["eps"], a["weight_bias"]), reduced


def reduce_add_norm(a, total):
    reduced = total(a["x"])
    if a["bias"] is not None:
        reduced = reduced + a["bias"]
    h = a["residual"] + a["alpha"] * reduced
    return norm(h, a["weight"], a["eps"], a["weight_bias"]), h


def sandwich(a, total):
    h = a["residual"] + norm(total(a["x"]), a["weight"], a["eps"], a["weight_bias"])
    return norm(h, a["weight2"], a["eps2"], a["weight_bias"]), h


def add_norm(a, total):
    h = a["x"] + a["residual"]
    return norm(h, a["weight"], a["eps"], a["weight_bias"]), h


def activation(a, total):
    gate = a["gate"]
    if a["act"] == "silu":
        return gate * torch.sigmoid(gate) * a["up"]
    return torch.nn.functional.gelu(gate, approximate="tanh") * a["up"]


def product(a, total):
    out = a["x"] @ a["weight"]
    return out if a["bias"] is None else out + a["bias"]


def saturate(a, value):
    """What a quantised value is after saturation: the rounding itself is the format's and is allowed for by the test."""
    scheme = a["scheme"].split(":")[0]
    limit = {"fp8_tensor": lambda: 448 * float(a["scale"]), "nvfp4": lambda: 6 * 448 / float(a["scale"])}.get(scheme)
    return value if limit is None else value.clamp(-limit(), limit())


def quantised(inner):
    def spelling(a, total):
        out = inner(a, total)
        out = (out,) if isinstance(out, torch.Tensor) else out
        return saturate(a, out[0]), None, *out

    return spelling


def turn(x, a):
    """Halves of each head as complex numbers, times e^(i·angle)."""
    half = x.shape[-1] // 2
    table = torch.complex(a["cos"], a["sin"])[..., :half].unsqueeze(-2)
    turned = torch.complex(x[..., :half], x[..., half:]) * table
    return torch.cat([turned.real, turned.imag], -1)


def norm_and_turn(a, total):
    return tuple(turn(norm(a[x], a[f"{x}_weight"], a["eps"], a["weight_bias"]), a) for x in ("q", "k"))


def attend(a, total):
    scores = torch.einsum("bhqd,bhkd->bhqk", a["q"], a["k"]) * a["softmax_scale"] + a["mask"]
    weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhkd->bqhd", weights, a["v"]).flatten(-2)


SPELLINGS = {
    "all_reduce": lambda a, total: total(a["x"]),
    "reduce_scatter": lambda a, total: total(a["x"]).chunk(total.world)[total.rank],
    "all_gather": lambda a, total: torch.cat(total.parts(a["x"])),
    "rms_norm": lambda a, total: norm(a["x"], a["weight"], a["eps"], a["weight_bias"]),
    "add_rms_norm": add_norm,
    "act_and_mul": activation,
    "matmul": product,
    "rotary": lambda a, total: (turn(a["q"], a), turn(a["k"], a)),
    "qk_norm_rope": norm_and_turn,
    "attention": attend,
    "attention_quantize": quantised(attend),
    "quantize": lambda a, total: (saturate(a, a["x"]), None),
    "all_reduce_rms_norm": reduce_norm,
    "all_reduce_add_rms_norm": reduce_add_norm,
    "all_reduce_rms_norm_add_rms_norm": sandwich,
    "all_reduce_rms_norm_quantize": quantised(reduce_norm),
    "all_reduce_add_rms_norm_quantize": quantised(reduce_add_norm),
    "all_reduce_rms_norm_add_rms_norm_quantize": quantised(sandwich),
    "rms_norm_quantize": quantised(lambda a, t: norm(a["x"], a["weight"], a["eps"], a["weight_bias"])),
    "add_rms_norm_quantize": quantised(add_norm),
    "act_and_mul_quantize": quantised(activation),
}
