"""What a compiled result depends on besides its graph, as one digest."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

import tpfuse
from tpfuse.config import Config


def cache_key(config: Config, *more: object) -> str:
    """A digest of tpfuse's own sources (rules and kernels among them), the config, torch and what else is given."""
    text = "\n".join([sources(), repr(config), torch.__version__, *map(repr, more)])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def sources(folder: str = "") -> str:
    """A digest of tpfuse's sources, or of those in one folder."""
    digest = hashlib.sha256()
    for path in sorted((Path(tpfuse.__file__).parent / folder).rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
