"""An operator made of two, the result of the first being the first argument of the second."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor  # noqa: F401  named by the annotations of the bodies below

from tpfuse.ir import declared
from tpfuse.ir.op import Args, Message, Op, registry


class Chained(Op):
    """`then` of the result of `first`.

    Its parameters are those of `first`, under the names that `renamed` gives them, then those of `then` without its first.
    Unfused, the two stand one after the other, so that the kernels of `then` still serve.  Its rule looks through `then`, whose
    own pass need not be on.
    """

    def __init__(
        self, name: str, first: Op, then: Op, renamed: Mapping[str, str], sample: Callable[..., Any], doc: str, fuse: str,
        message: Callable[[Args], Message],
    ) -> None:  # fmt: skip
        self.first, self.then, self.renamed = first, then, renamed
        self.through = frozenset({str(then.fuse)})

        def body(*args: Any) -> Any:
            own, rest = self.halves(args)
            return then(first(*own), *rest)

        head = [
            p.replace(name=renamed.get(p.name, p.name), default=inspect.Parameter.empty)  # others without defaults follow
            for p in first.signature.parameters.values()
        ]
        rest = list(then.signature.parameters.values())[1:]
        body.__signature__ = then.signature.replace(parameters=[*head, *rest])  # type: ignore[attr-defined]
        body.__name__, body.__doc__ = name, doc
        super().__init__(
            body, None, sample, "collective", (*first.row_args, *then.row_args[1:]), None, fuse,
            guard=lambda args: then.guard(self.after(args)), opaque=lambda args: False, message=message,
        )  # fmt: skip
        registry[name] = self

    @functools.cached_property
    def shapes(self) -> dict[str, declared.Shape]:
        return declared.chained(self.first, self.then, self.renamed)

    def halves(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Arguments by position: those of `first`, and those of `then` behind its first."""
        return args[: len(self.first.params)], args[len(self.first.params) :]

    def after(self, args: Args) -> dict[str, Any]:
        """The arguments of `then`, the first result a fake."""
        own, rest = self.halves(list(args.values()))
        return dict(zip(self.then.params, (self.first.fake(*own), *rest), strict=True))

    @property
    def in_f32(self) -> bool:
        """Of what follows: the first result is rounded, as it is unfused."""
        return self.then.in_f32

    def _reference_alive(self, *args: Any, alive: tuple[bool, ...], wide: bool = False) -> Any:
        own, rest = self.halves(args)
        return self.then._reference_alive(self.first.reference(*own), *rest, alive=alive, wide=wide)

    def _fake_of_lowered(self, args: Sequence[Any], wide: bool) -> Any:
        own, rest = self.halves(args)
        return self.then._fake_of_lowered((self.first.fake(*own), *rest), wide)
