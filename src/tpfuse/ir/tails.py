"""Operators made of another one and a tail: the quantise of its first result, or all ranks' rows of what each has of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor

from tpfuse.ir.collective import all_gather, all_gather_quantized
from tpfuse.ir.op import Op, op
from tpfuse.ir.quant import quant_sample, quantize

SHARING = ("padded", "group")  # parameters that say how rows are shared out, the last ones


def quantized(first: Op, fuse: str, **more: Any) -> Op:
    """`…_quantize` → (q, scales, the results of `first`).

    Its parameters are the tensors of `first`, none with a default, and the scale, then the others, scheme and layout, then how
    rows are shared out.  fuse: its pass.  more: what `op` takes besides.
    """
    scale, *how = list(quantize.signature.parameters.values())[1:]
    given = first.signature.parameters.values()
    tensors = [p.replace(default=Parameter.empty) for p in given if "Tensor" in p.annotation]
    others = [p for p in given if "Tensor" not in p.annotation and p.name not in SHARING]
    sharing = [p for p in given if p.name in SHARING]
    names = _results(first)
    whose = ", of own rows" * ("padded" in first.params)
    doc = f"`{first.name}`, then `quantize` of its {names[0]} → (q, scales, {', '.join(names)}){whose}."
    parameters = [*tensors, scale, *others, *how, *sharing]
    return _tailed(first, quantize, "quantize", parameters, first.results, doc, quant_sample, fuse=fuse, **more)


def gathered(first: Op, fuse: str, **more: Any) -> Op:
    """`…_all_gather` → (norm of all rows, norm and sum of own rows); where `first` quantises, (q and scales of all rows, …).

    Its parameters are those of `first` and, before the group, the number of rows.  fuse, more: as for `quantized`.
    """
    *given, group = first.signature.parameters.values()
    then = all_gather_quantized if "scheme" in first.params else all_gather
    names = _results(first)
    moved, own = " and ".join(names[: len(then.row_args)]), " and ".join(names[-2:])
    doc = (
        f"`{first.name}`, then `{then.name}` of its {moved}\n→ ({moved} of all rows, {own} of own rows).\n\n"
        f"rows: as for `{then.name}`; the rows of x where padded."
    )
    rows = then.signature.parameters["rows"]
    return _tailed(first, then, "all_gather", [*given, rows, group], 2, doc, _row_sample, fuse=fuse, **more)


def _row_sample(**shape: Any) -> dict[str, Any]:
    return {"rows": shape["tokens"]}


def _tailed(
    first: Op, then: Op, suffix: str, parameters: Sequence[Parameter], kept: int, doc: str,
    sample: Callable[..., dict[str, Any]], **more: Any,
) -> Op:  # fmt: skip
    """`first`, then `then` of the results that come first → (its results, the last `kept` of `first`)."""
    taken = len(then.row_args)
    signature = Signature(parameters, return_annotation=f"tuple[{', '.join(['Tensor'] * (then.results + kept))}]")

    def body(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        results = _tuple(first(*(given[name] for name in first.params)))
        behind = then(*results[:taken], *(given[name] for name in then.params[taken:]))
        return *_tuple(behind), *results[-kept:]

    body.__name__, body.__doc__ = f"{first.name}_{suffix}", doc
    body.__signature__ = signature  # type: ignore[attr-defined]
    return op(
        sample=lambda **shape: {**first.sample(**shape), **sample(**shape)}, rows=first.rows, row_args=first.row_args,
        commutes=first.commutes, **more,
    )(body)  # fmt: skip


def _results(made: Op) -> list[str]:
    """What an operator's text calls its results."""
    named = re.search(r"→ \(([^)]+)\)", made.doc)
    return named[1].split(", ") if named else ["result"]


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
