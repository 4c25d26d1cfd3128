"""Small frozen types that the schemas of operators hold as one string: a base and flags, "cast_first+low_bias"."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Flagged:
    """A base, one of `BASES`, and the fields that a subclass adds, each a flag.

    KIND: what it is called in errors.  ValueError, naming the closest known word, for a base or a flag that there is not.
    """

    KIND: ClassVar[str]
    BASES: ClassVar[tuple[str, ...]]
    base: str

    def __post_init__(self) -> None:
        if self.base not in self.BASES:
            raise ValueError(f"unknown {self.KIND} {self.base!r}{closest(self.base, self.BASES)}")

    @classmethod
    def flags(cls) -> list[str]:
        return [field.name for field in fields(cls)[1:]]

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """The one written as `text`."""
        return text if isinstance(text, cls) else _parse(cls, text)

    def __str__(self) -> str:
        return "+".join([self.base, *(flag for flag in self.flags() if getattr(self, flag))])


@cache
def _parse(kind: type[Flagged], text: str) -> Any:
    base, *flags = text.split("+")
    for flag in flags:
        if flag not in kind.flags():
            raise ValueError(f"unknown flag {flag!r} of {kind.KIND} {text!r}{closest(flag, kind.flags())}")
    return kind(base, **dict.fromkeys(flags, True))


def closest(word: str, known: Sequence[str]) -> str:
    """The end of a message about a word that is none of `known`."""
    return f"; did you mean {difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]!r}?"
