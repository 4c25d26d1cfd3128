"""Reading the machine once, when the first graph is lowered."""

from __future__ import annotations

import functools
import importlib.util
from importlib import metadata

import torch

from tpfuse.runtime.key import sources
from tpfuse.shim import resolve_group
from tpfuse.target import Target


def detect(device: str, group: str | None) -> Target:
    """The Target of this process for operators over `group` (None: operators without a collective)."""
    world = resolve_group(group).size() if group else 1
    return _detect(device, world)


@functools.cache
def machine(device: str) -> str:
    """What a table's measurements hold for: "2 x NVIDIA H100 80GB HBM3", "cpu"."""
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if device == "cuda" else device


@functools.cache
def _detect(device: str, world: int) -> Target:
    if device != "cuda":
        return Target(device, world=world)
    major, minor = torch.cuda.get_device_capability()
    backends = {"reference", "nccl", "torch", "cuda"}
    versions = {"torch": str(torch.__version__), "kernels": sources("kernels")[:12]}
    for name, package in (("triton", "triton"), ("flashinfer", "flashinfer-python")):
        if importlib.util.find_spec(name) is not None:
            backends.add(name)
            versions[name] = metadata.version(package)
    local = min(world, torch.cuda.device_count())
    here = torch.cuda.current_device()
    peers = world == 1 or (
        local == world and all(torch.cuda.can_device_access_peer(here, d) for d in range(local) if d != here)
    )
    return Target("cuda", major * 10 + minor, world, peers, frozenset(backends), versions)
