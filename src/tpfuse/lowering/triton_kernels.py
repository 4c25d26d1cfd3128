"""Registers the Triton kernels on their operators, and says why one cannot serve.  Imports no kernel.

A collective has three: `triton:one_shot`, `triton:two_shot`, and `triton`, which chooses between them at each launch by
the message's size and is what lowering picks where nothing was measured.  So has attention, by the number of keys:
`triton:flash` is one launch, `triton:sdpa` torch's attention and a kernel that quantises its rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tpfuse.formats import Scheme
from tpfuse.ir import fused
from tpfuse.ir.attention import attention_quantize
from tpfuse.ir.norm import Rounding
from tpfuse.ir.op import Args
from tpfuse.ir.rope import qk_norm_rope
from tpfuse.report import Decline
from tpfuse.rewrite.match import same
from tpfuse.target import Target

MAX_HIDDEN = 16384
MAX_ACT_HIDDEN = 32768  # where one scale spans the row
MAX_WORLD = 8
MAX_HEAD_DIM = 512  # of heads that are normalised
HEAD_DIMS = (64, 96, 128, 192, 256)  # of attention
MIN_QUERIES = 128  # a block's
DTYPES = (torch.bfloat16, torch.float16)
PREPARE = "tpfuse.runtime.workspaces:prepare"


def norm_supports(args: Args, target: Target) -> Decline | None:
    """For rows of one norm, on one GPU."""
    x = args["x"]
    hidden = x.shape[-1]
    if reason := _device(target) or _rows(args, ("residual",)):
        return reason
    if hidden > MAX_HIDDEN:
        return Decline("hidden_too_large", f"rows of {hidden} do not fit the registers of one block: at most {MAX_HIDDEN}")
    return None


def act_supports(args: Args, target: Target) -> Decline | None:
    """For a gated activation."""
    hidden = args["gate"].shape[-1]
    if reason := _device(target) or _rows({**args, "x": args["gate"]}, ("up",)):
        return reason
    scheme = Scheme.parse(args["scheme"]).name
    if scheme == "fp8_tensor":
        return Decline("no_launch_saved", "Inductor makes one kernel of it too, and no slower for many rows")
    if scheme == "fp8_token" and hidden > MAX_ACT_HIDDEN:
        return Decline("hidden_too_large", f"one scale for a row of {hidden}: at most {MAX_ACT_HIDDEN}")
    return None


def rope_supports(args: Args, target: Target) -> Decline | None:
    """For the norms of q's and k's heads and their rotation."""
    q, k, width = args["q"], args["k"], args["q"].shape[-1]
    if reason := _device(target):
        return reason
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        return Decline("dtype", f"bfloat16 and float16 are supported, one for both, not {q.dtype} and {k.dtype}")
    if any(w is not None and w.dtype != q.dtype for w in (args["q_weight"], args["k_weight"])):
        return Decline("weight_dtype", f"a weight is not {q.dtype}, which q and k are")
    if Rounding.parse(args["rounding"]).keep_f32:
        return Decline("rounding", "the norms' results stay in FP32")
    if width % 2 or width > MAX_HEAD_DIM:
        return Decline("head_dim", f"heads of {width}: even widths up to {MAX_HEAD_DIM} are supported")
    if any(x.stride(-1) != 1 for x in (q, k)):
        return Decline("strides", "the elements of a head do not lie side by side")
    return None


def attention_supports(args: Args, target: Target) -> Decline | None:
    """For attention whose rows are quantised."""
    q, k, v = args["q"], args["k"], args["v"]
    if reason := _device(target):
        return reason
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return Decline("dtype", f"bfloat16 and float16 are supported, one for all, not {q.dtype}, {k.dtype} and {v.dtype}")
    if args["mask"] is not None:
        return Decline("mask", "attention to all keys and causal attention are supported, a mask is not")
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] not in HEAD_DIMS:
        return Decline("head_dim", f"heads of {q.shape[-1]} and values of {v.shape[-1]}: {HEAD_DIMS} are supported")
    if args["softmax_scale"] <= 0:
        return Decline("softmax_scale", f"{args['softmax_scale']} is not positive")
    if reason := attention_quantize.guard(args) or _one_scale(args):
        return reason
    if not all(map(_tiles, (q, k, v))):
        return Decline("strides", "heads are no whole 16-byte vectors side by side, of which TMA loads tiles")
    tokens, keys = q.shape[2], k.shape[2]
    if not same(tokens, keys) and not statically_known_true(tokens >= MIN_QUERIES):
        return Decline("few_queries", f"fewer than {MIN_QUERIES} queries to other keys than their own leave the GPU idle")
    return None


def _tiles(x: Any) -> bool:
    steps = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if not same(n, 1)]
    return x.stride(-1) == 1 and all(same(s % 8, 0) for s in steps)


def collective_supports(args: Args, target: Target) -> Decline | None:
    """For a collective and the norm behind it, whatever the algorithm."""
    return ranks_support(target) or norm_supports(args, target)


def ranks_support(target: Target) -> Decline | None:
    """For any kernel that writes into other ranks' memory."""
    if not 2 <= target.world <= MAX_WORLD:
        return Decline("world_size", f"{target.world} ranks: 2 to {MAX_WORLD} are supported")
    if not target.peer_access:
        return Decline("no_peer_access", "the ranks cannot map each other's memory")
    return _device(target)


def _device(target: Target) -> Decline | None:
    if target.device != "cuda" or target.sm < 90:
        return Decline("no_sm_90", f"needs compute capability 9.0 or later, not {target.device} {target.sm}")
    return None


def _rows(args: Any, others: tuple[str, ...]) -> Decline | None:
    x = args["x"]
    if x.dtype not in DTYPES:
        return Decline("dtype", f"bfloat16 and float16 are supported, not {x.dtype}")
    if x.shape[-1] % 8:
        return Decline("hidden_not_multiple_of_8", f"rows of {x.shape[-1]} are no whole 16-byte vectors")
    for name in others:
        other = args.get(name)
        if other is not None and (other.dtype != x.dtype or other.shape[-1] != x.shape[-1]):
            return Decline("row_dtype", f"{name} is {other.dtype}, the rows are {x.dtype}")
    return _one_scale(args)


def _one_scale(args: Any) -> Decline | None:
    scale = args.get("scale")
    if scale is not None and scale.numel() != 1:
        return Decline("scale_shape", f"a given scale must be one number, not {list(scale.shape)}")
    return None


for _op in fused.ALL_REDUCES:
    for _module, _algorithm in (("allreduce_norm", "one_shot"), ("two_shot", "two_shot"), ("by_size", "")):
        _op.kernel("triton", f"tpfuse.kernels.{_module}:{_op.name}", collective_supports, _algorithm, PREPARE)
for _op, _supports in (
    (fused.rms_norm_quantize, norm_supports), (fused.add_rms_norm_quantize, norm_supports),
    (fused.act_and_mul_quantize, act_supports),
):  # fmt: skip
    _op.kernel("triton", f"tpfuse.kernels.norm_quant:{_op.name}", _supports)
qk_norm_rope.kernel("triton", "tpfuse.kernels.rope:qk_norm_rope", rope_supports)
for _algorithm in ("flash", "sdpa", ""):
    _launch = f"tpfuse.kernels.attention:{_algorithm or 'attention_quantize'}"
    attention_quantize.kernel("triton", _launch, attention_supports, _algorithm)
