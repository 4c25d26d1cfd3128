"""Tests generated from the declarations: every operator against plain FP64 torch, every fake against real results."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.ir.plain import SPELLINGS
from tpfuse import formats, ir

DTYPES = {"fp32": (torch.float32, 1e-6), "bf16": (torch.bfloat16, 1.2e-2), "fp16": (torch.float16, 1.5e-3)}
SCHEMES = ("fp8_tensor", "fp8_token", "fp8_group64", "nvfp4")
# Half a step of the format beside the largest value of its kind: e4m3 has 3 mantissa bits, e2m1 has 1 and a scale in e4m3.
QUANT_ERROR = {"fp8": 0.04, "nvfp4": 0.16}
SPELLED = [ir.registry[name] for name in SPELLINGS]


def results(out):
    return (out,) if isinstance(out, Tensor) else tuple(out)


def cases(op):
    """Shapes and attributes at which an operator is tried."""
    for tokens, hidden in ((1, 64), (7, 192), (33, 128)):
        for bias in (0.0, 1.0) if "weight_bias" in op.params else (0.0,):
            for scheme in SCHEMES if "scheme" in op.params else ("fp8_tensor",):
                yield {"tokens": tokens, "hidden": hidden, "weight_bias": bias, "scheme": scheme}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


class Total:
    def __init__(self, rank, world):
        self.rank, self.world = rank, world

    def parts(self, x):
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def __call__(self, x):
        return torch.stack(self.parts(x)).sum(0)


def compare(op, shape, dtype, group, rank, world):
    args = op.sample(**shape, dtype=DTYPES[dtype][0], group=group, rank=rank)
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}

    total = Total(rank, world)
    wanted = results(SPELLINGS[op.name](wide, total))
    got = results(op.default(*args.values()))
    for i, want in enumerate(wanted):
        if want is None:
            continue
        value, bound = got[i], DTYPES[dtype][1]
        if i == 0 and "scheme" in args:
            bound = QUANT_ERROR["nvfp4" if args["scheme"] == "nvfp4" else "fp8"]
            value = formats.dequantize(value, got[1], args["scale"], args["scheme"], args["layout"], torch.float64)
        error = relative(value, want)
        assert error < bound, f"{op.name} {shape} {dtype} result {i}: error {error:.3g} over {bound}"
        if args.get("eps") and i == len(wanted) - 2 and dtype == "fp32":
            other = SPELLINGS[op.name]({**wide, "eps": args["eps"] * 10}, total)
            assert relative(value, results(other)[i]) > 3 * bound, f"{op.name}: a tenfold epsilon would not be seen"


def compare_all(rank, world, dtype):
    group = dist.group.WORLD.group_name
    for op in SPELLED:
        for shape in cases(op):
            if op.name == "reduce_scatter":
                shape = {**shape, "tokens": shape["tokens"] * world}
            compare(op, shape, dtype, group, rank, world)
    return True


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_float64(ranks, dtype):
    assert all(ranks.run(compare_all, dtype))


def fakes_match(rank, world):
    group = dist.group.WORLD.group_name
    for op in ir.registry.values():
        for shape in [c for c in cases(op) if c["tokens"] == 7 and not c["weight_bias"]]:
            if op.name == "reduce_scatter":
                shape = {**shape, "tokens": shape["tokens"] * world}
            args = op.sample(**shape, group=group, rank=rank)
            real = results(op.default(*args.values()))
            mode = FakeTensorMode(shape_env=ShapeEnv())
            fakes = tree_map_only(Tensor, lambda v, m=mode: m.from_tensor(v, static_shapes=False), list(args.values()))
            with mode:
                fake = results(op.default(*fakes))
            for r, f in zip(real, fake, strict=True):
                have = ([int(s) for s in f.shape], [int(s) for s in f.stride()], f.dtype)
                assert have == (list(r.shape), list(r.stride()), r.dtype), f"{op.name} {shape}: {have}"
            tensors = [t for t in (*real, *tree_leaves(args)) if isinstance(t, Tensor) and t.numel()]
            storages = [t.untyped_storage().data_ptr() for t in tensors]
            assert len(set(storages)) == len(storages), f"{op.name}: a result shares memory with another tensor"
    return True


def test_fakes_match_real_results(ranks):
    assert all(ranks.run(fakes_match))


def lowered_results(rank, world):
    group = dist.group.WORLD.group_name
    for op in ir.registry.values():
        shape = {"tokens": 6 * world, "hidden": 64}
        args = op.sample(**shape, group=group, rank=rank)
        whole = results(op.default(*args.values()))
        for alive in {1, 1 << op.results - 1, (1 << op.results) - 1}:
            channel = [torch.zeros(1, dtype=torch.uint8)] if op.collective else []
            some = results(op.lowered(*channel, *args.values(), "reference", alive))
            for i, (a, b) in enumerate(zip(some, whole, strict=True)):
                wanted = b if op.variadic or alive >> i & 1 else b.new_empty(0)
                assert torch.equal(*[t.contiguous().view(torch.uint8) if t.numel() else t for t in (a, wanted)]), op.name
    return True


def test_lowered_form_keeps_what_is_alive(ranks):
    assert all(ranks.run(lowered_results))


def test_every_operator_has_a_plain_spelling():
    with_test_files_of_their_own = {"scaled_matmul", "shard_rows", "all_gather_quantized"}
    for op in ir.registry.values():  # so have those on row shards, in tests/dist
        assert op.name in with_test_files_of_their_own or op.fuse in ("sequence_parallel", "async_tp") or op.name in SPELLINGS


def test_operators_document_themselves():
    for op in ir.registry.values():
        assert "→" in op.doc, op.name
