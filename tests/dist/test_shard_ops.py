"""Operators on row shards of uneven token counts, on real gloo ranks: what they move, and their fakes."""

import pytest
import torch
import torch.distributed as dist

from tpfuse import formats
from tpfuse.ir import registry
from tpfuse.ir.overlap import WITH_NORM
from tpfuse.ir.samples import rows

TOKENS = (1, 7, 24, 129)
LAYOUTS = [
    ("fp8_tensor", "row"), ("fp8_token", "row"), ("fp8_group64", "row"), ("fp8_group64", "col"),
    ("fp8_group64", "col+tma"), ("fp8_group64", "row+ue8m0_packed"), ("nvfp4", "linear"), ("nvfp4", "swizzled_128x4"),
    ("nvfp4", "swizzled_8x4"),
]  # fmt: skip
pytestmark = pytest.mark.timeout(300)
world_sizes = pytest.mark.parametrize("ranks", [2, 3, 4], indirect=True)


def group():
    return dist.group.WORLD.group_name


def meta(out):
    return [(t.shape, t.dtype, t.stride()) for t in ([out] if isinstance(out, torch.Tensor) else out)]


def faked(op, args):
    """Shapes, dtypes and strides as the operator's fake gives them for these arguments."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return meta(op.default(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]))


def equal(a, b):
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def move(rank, world):
    scatter, gather, own = registry["reduce_scatter"], registry["all_gather"], registry["shard_rows"]
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens in TOKENS:
            x = [rows(tokens=tokens, hidden=16, dtype=dtype, rank=r) for r in range(world)]
            share = -(-tokens // world)
            mine = sum(t.double() for t in x)[rank * share : (rank + 1) * share]
            calls = {
                "reduce_scatter": (scatter, (x[rank], group(), True)),
                "shard_rows": (own, (x[0], group())),
                "all_gather": (gather, (own(x[0], group()), group(), tokens)),
            }
            got = {name: op(*args) for name, (op, args) in calls.items()}
            wrong += [(n, "fake", dtype, tokens) for n, (op, args) in calls.items() if meta(got[n]) != faked(op, args)]
            part = got["reduce_scatter"]
            close = torch.allclose(part[: len(mine)].double(), mine, rtol=0, atol=0.02 * world * torch.finfo(dtype).eps)
            if part.shape != (share, 16) or not close or part[len(mine) :].any():
                wrong.append(("reduce_scatter", dtype, tokens))
            if not torch.equal(got["all_gather"], x[0]):
                wrong.append(("all_gather of shard_rows", dtype, tokens))
    return wrong


def move_quantized(rank, world, scheme, layout):
    op = registry["all_gather_quantized"]
    wrong = []
    for tokens in TOKENS:
        sample = registry["quantize"].sample(tokens=tokens, hidden=192, scheme=scheme, layout=layout)
        q, scales = formats.quantize(sample["x"], sample["scale"], scheme, layout)
        own = formats.quantize(registry["shard_rows"](sample["x"], group()), sample["scale"], scheme, layout)
        args = (*own, scheme, layout, group(), tokens)
        got = op(*args)
        if not (equal(got[0], q) and equal(got[1], scales) and got[1].stride() == scales.stride()):
            wrong.append((scheme, layout, tokens, got[1].shape, scales.shape))
        if meta(got) != faked(op, args):
            wrong.append((scheme, layout, tokens, "fake"))
    return wrong


def composites(rank, world, dtype, weight_bias):
    """Each composite beside the plain computation: errors against FP64 at most 1.25 times those of `dtype`."""
    gather, wrong = registry["all_gather"], []
    for name, op in registry.items():
        if op.fuse != "sequence_parallel" and op not in WITH_NORM:
            continue
        for tokens in (1, 7, 24):
            shape = {"tokens": tokens, "hidden": 64, "dtype": dtype, "weight_bias": weight_bias, "group": group()}
            every = [op.sample(**shape, rank=r) for r in range(world)]
            out = list(op(**every[rank]))
            gathered = name.endswith("all_gather")
            names = ["q", "scales", "norm", "h"] if "quantize" in name else ["norm"] * gathered + ["norm", "h"]
            products = [product(op, a) for a in every]
            exact = plain(products, tokens, torch.float64)
            unfused = [plain(products, tokens, dtype, first) for first in range(world)]
            for i, (key, value) in enumerate(zip(names, out, strict=True)):
                if key == "scales":
                    continue  # fp8_tensor has none; their gather is tested alone
                value = value if gathered and i == 0 else gather(value, group(), tokens)
                error, *others = ((v.double() - exact[key].double()).norm().item() for v in (value, *(u[key] for u in unfused)))
                base = max(others)
                if value.shape[0] != tokens or not error <= 1.25 * base + 1e-6 * exact[key].double().norm().item():
                    wrong.append((name, tokens, key, error, base))
    return wrong


def product(op, args):
    """The arguments with x the product, in FP64 too, where the operator has one."""
    if op not in WITH_NORM:
        return args
    own = list(args.values())[: len(op.first.params)]
    wide = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in own]
    return {**args, "x": op.first(*own), "exact": op.first(*wide)}


def plain(every, tokens, dtype, first=0):
    """Norm, quantised norm and residual of all rows, from every rank's arguments, as an unfused graph in `dtype`, summed from
    rank `first` on: where a collective starts is its own affair."""
    norm, kind = registry["rms_norm"], every[0]
    vector = {k: v.to(dtype) for k, v in kind.items() if k in ("weight", "weight2", "bias")}
    parts = [a["exact" if dtype == torch.float64 and "exact" in a else "x"].to(dtype) for a in every]
    h = sum(parts[first:] + parts[:first])
    h = h + vector["bias"] if "bias" in vector else h
    how = (kind["weight_bias"], kind["rounding"])
    weight, eps = vector["weight"], kind["eps"]
    if "weight2" in vector:
        h = norm(h, weight, eps, *how)
        weight, eps = vector["weight2"], kind["eps2"]
    if "residual" in kind:
        residual = torch.cat([a["residual"] for a in every])[:tokens]
        h = residual.to(dtype) + kind.get("alpha", 1.0) * h
    out = {"h": h, "norm": norm(h, weight, eps, *how)}
    if "scale" in kind:
        out["q"] = (out["norm"] / kind["scale"]).clamp(-448, 448)
        out["q"] = out["q"] if dtype == torch.float64 else out["q"].to(torch.float8_e4m3fn)
    return out


@world_sizes
def test_rows_move(ranks):
    assert ranks.run(move) == [[]] * ranks.world


@world_sizes
def test_quantised_rows_move(ranks):
    for scheme, layout in LAYOUTS:
        assert ranks.run(move_quantized, scheme, layout) == [[]] * ranks.world


@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_composites(ranks, dtype, weight_bias):
    assert ranks.run(composites, dtype, weight_bias) == [[]] * ranks.world
