"""`Config(verify=True)`: a fused site beside its unfused body on the same live inputs, both against FP64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpfuse.report import FusionError

if TYPE_CHECKING:
    from tpfuse.ir.op import Op

PREFIX = "verify@"
MARGIN = 1.25
_tell: ContextVar[Callable[[dict[str, Any]], None]] = ContextVar("tell", default=lambda row: None)


@contextmanager
def told_to(tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Inside, `tell` is called with a row for each result that is checked."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


def checked(op: Op, args: tuple[Any, ...], spec: str, alive: tuple[bool, ...]) -> Any:
    """Run the kernel of `spec` ("verify@<site>|<kernel>"), compare, return its results.

    FusionError where a result's error against FP64 exceeds 1.25 × the unfused body's.
    """
    site, kernel = spec.removeprefix(PREFIX).rsplit("|", 1)
    out = op.launcher(kernel)(*args, alive=alive)
    body = op.reference(*args)
    exact = op.reference(*(_wide(a) for a in args))
    for i, (got, unfused, true) in enumerate(zip(_tuple(out), _tuple(body), _tuple(exact), strict=True)):
        if not (op.variadic or alive[i]) or got.numel() == 0:
            continue
        error, base = _error(got, true), _error(unfused, true)
        difference = (got.double() - unfused.double()).abs().max().item()
        _tell.get()(
            {"site": site, "operator": op.name, "kernel": kernel, "result": i, "error": error, "unfused_error": base,
             "max_difference": difference}
        )  # fmt: skip
        if not error <= base * MARGIN + torch.finfo(torch.float32).eps:
            raise FusionError(f"verify: {op.name} at {site or '(graph)'}, result {i}: error {error:.3g}, unfused {base:.3g}")
    return out


def _wide(value: Any) -> Any:
    if isinstance(value, list):
        return [_wide(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _error(value: Tensor, true: Tensor) -> float:
    """‖value − true‖ / ‖true‖."""
    difference, scale = (value.double() - true.double()).norm(), true.double().norm()
    return (difference / scale).item() if scale > 0 else difference.item()
