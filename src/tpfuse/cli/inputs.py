"""What a user gave a command: read, and refused with a sentence where it cannot work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tpfuse.config import Config, from_text, known
from tpfuse.formats.scheme import SCHEME_NAMES
from tpfuse.lowering.table import Table

HF = ("transformers", "accelerate", "safetensors")


class BadInput(ValueError):
    """Something the user gave cannot work; the message says what and what would."""


def read_config(settings: Sequence[str], **given: Any) -> Config:
    """A Config from `field=value` texts and from options that were given.  BadInput names the closest known field or pass, or
    says why the table cannot be read."""
    values = {k: v for k, v in given.items() if v}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise BadInput(f"--set {setting}: expected field=value")
        values[name.replace("-", "_")] = from_text(text)
    try:
        config = Config.of(values)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if config.table:
        read_table(config.table)
    if config.dump:
        writable(Path(config.dump) / "graph.txt")
    return config


def numbers(option: str, text: str | None, default: Sequence[int], or_none: bool = False) -> list[int]:
    """"1,8,64" → [1, 8, 64].  BadInput, naming the option, where that is no list of positive numbers.

    or_none: "" is a list as well, of nothing.
    """
    if text is None or (or_none and not text):
        return list(default) if text is None else []
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise BadInput(f"{option} {text!r}: expected numbers from 1 on, separated by commas")
    return [int(word) for word in words]


def pairs(option: str, text: str | None, expected: str) -> list[tuple[int, int]]:
    """"4096x14336,8192x28672" → [(4096, 14336), (8192, 28672)]; None → [].  BadInput, naming the option and what was `expected`,
    where it is no such list."""
    found = []
    for word in text.split(",") if text is not None else ():
        parts = word.split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise BadInput(f"{option} {word!r}: expected {expected}")
        found.append((int(parts[0]), int(parts[1])))
    return found


def schemes(text: str | None, default: Sequence[str]) -> list[str]:
    """"none,nvfp4" → ["", "nvfp4"].  BadInput naming the closest known scheme."""
    return ["" if name == "none" else name for name in names("scheme", text, default, ("none", *SCHEME_NAMES))]


def names(kind: str, text: str | None, default: Sequence[str], among: Sequence[str]) -> list[str]:
    """"a,b" → ["a", "b"].  BadInput naming the closest of `among` for what is none of them."""
    found = list(default) if text is None else text.split(",")
    try:
        for name in found:
            known(kind, name, among)
    except ValueError as error:
        raise BadInput(str(error)) from error
    return found


def read_table(path: str | Path) -> Table:
    """A tuned table.  BadInput where the file is missing or none."""
    try:
        return Table.load(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read as a table: {error.strerror}; tpfuse tune writes one") from error
    except ValueError as error:
        raise BadInput(f"{error}; tpfuse tune writes one") from error


def require(what: str, *packages: str, extra: str) -> None:
    """BadInput, with what installs them, where packages are missing."""
    if missing := [package for package in packages if version(package) is None]:
        raise BadInput(f"{what} need {', '.join(missing)}: pip install 'tpfuse[{extra}]'")


def cxx() -> str:
    """The C++ compiler that Inductor makes code for CPUs with, by the names that it looks for itself.  BadInput where there is
    none."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "clang++", "c++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        what = "apt install g++, or name one in CXX" if not wanted else "CXX names it"
        raise BadInput(f"none of {', '.join(names)} found: Inductor cannot compile for CPUs ({what})")
    return found


def version(package: str) -> str | None:
    """That of an installed package; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def writable(*paths: Path | None) -> None:
    """Make the folders that files will be written to.  BadInput where one cannot be written, before anything has been run."""
    for path in filter(None, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.exists()
            path.open("a").close()
            if not there:
                path.unlink()
        except OSError as error:
            raise BadInput(f"{path}: cannot be written: {error.strerror}") from error
