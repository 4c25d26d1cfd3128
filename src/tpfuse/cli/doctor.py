"""`tpfuse doctor`: versions, devices, links, back ends; what is usable, and why not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from tpfuse.cli import fit
from tpfuse.cli.inputs import HF, BadInput, cxx, version
from tpfuse.config import Config, table_path
from tpfuse.lowering.table import Table as Measured
from tpfuse.raising import adapters
from tpfuse.runtime.detect import detect, machine

PACKAGES = (
    "tpfuse", "torch", "triton", "transformers", "accelerate", "safetensors", "gguf", "torchao", "flashinfer-python",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One line.  usable: None where it is a plain fact.  detail: the version, the figure, or what is missing."""

    area: str
    name: str
    usable: bool | None
    detail: str


def examine() -> list[Fact]:
    """What this machine has.  Changes nothing and starts nothing on a GPU."""
    return [*_versions(), *_settings(), *_devices(), *_links(), *_compiler(), *_backends(), *_table(), *_adapters()]


def show(console: Console, facts: list[Fact]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    area = ""
    for fact in facts:
        if fact.area != area:
            table.add_row(f"[bold]{fact.area}[/bold]", "")
            area = fact.area
        mark = {None: "", True: "[green]yes[/green] ", False: "[red]no[/red]  "}[fact.usable]
        table.add_row(f"  {fact.name}", f"{mark}{fact.detail}")
    fit.show(console, table)


def as_json(facts: list[Fact]) -> list[dict[str, Any]]:
    return [asdict(fact) for fact in facts]


def _versions() -> Iterator[Fact]:
    yield Fact("Versions", "python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        yield Fact("Versions", package, None, version(package) or "not installed")
    yield Fact("Versions", "CUDA of torch", None, torch.version.cuda or "none: this torch is built for CPUs")


def _settings() -> Iterator[Fact]:
    """What the environment sets, and what of it is wrong."""
    for name in sorted(name for name in os.environ if name.startswith("TPFUSE_")):
        yield Fact("Settings", name, None, os.environ[name])
    try:
        Config.of(None)
    except ValueError as error:
        yield Fact("Settings", "environment", False, str(error))


def _devices() -> Iterator[Fact]:
    yield Fact("Devices", "CPU cores", None, str(len(os.sched_getaffinity(0))))
    if not torch.cuda.is_available():
        yield Fact("Devices", "GPUs", False, "none visible" if torch.version.cuda else "this torch is built for CPUs")
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        yield Fact("Devices", f"GPU {i}", None, f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory >> 30} GiB")


def _links() -> Iterator[Fact]:
    count = torch.cuda.device_count()
    if count < 2:
        yield Fact("Links", "peer access", False, f"{count} GPUs: nothing to link" if count else "no GPU")
        return
    for i in range(count):
        unreachable = [j for j in range(count) if j != i and not torch.cuda.can_device_access_peer(i, j)]
        detail = f"not to GPU {', '.join(map(str, unreachable))}" if unreachable else "to every other GPU"
        yield Fact("Links", f"peer access of GPU {i}", not unreachable, detail)
    tool = shutil.which("nvidia-smi")
    if tool:
        matrix = subprocess.run([tool, "topo", "-m"], capture_output=True, text=True, timeout=30, check=False).stdout
        for line in matrix.splitlines():
            if line.startswith("GPU"):
                yield Fact("Links", line.split()[0], None, " ".join(line.split()[1 : count + 1]))


def _compiler() -> Iterator[Fact]:
    """What Inductor needs to make code for CPUs."""
    try:
        found = cxx()
    except BadInput as error:
        yield Fact("Compilers", "C++", False, str(error))
        return
    told = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    yield Fact("Compilers", "C++", True, (told.splitlines() or [found])[0])


def _backends() -> Iterator[Fact]:
    gpu = torch.cuda.is_available()
    yield Fact("Back ends", "reference", True, "every operator, any device; what auto picks on a CPU")
    yield Fact("Back ends", "gloo", dist.is_gloo_available(), "collectives between CPUs")
    yield _needs_gpu("nccl", dist.is_nccl_available(), gpu, "collectives between GPUs", "torch is built without it")
    for name, package in (("triton", "triton"), ("flashinfer", "flashinfer-python")):
        installed = importlib.util.find_spec(name) is not None
        yield _needs_gpu(name, installed, gpu, f"{version(package)}", "not installed")
    symmetric = importlib.util.find_spec("torch.distributed._symmetric_memory") is not None
    yield _needs_gpu("torch symmetric memory", symmetric, gpu, "fused collectives", f"not in torch {torch.__version__}")
    yield Fact(
        "Back ends", "Hugging Face models", *_installed(*HF, extra="hf")
    )
    yield Fact("Back ends", "GGUF files", *_installed(*HF, "gguf", extra="gguf"))


def _table() -> Iterator[Fact]:
    """What `tpfuse tune` left for this machine."""
    if not torch.cuda.is_available():
        return
    path = table_path(machine("cuda"))
    if not path.exists():
        yield Fact("Measured", "table", False, f"none at {path}: run tpfuse tune")
        return
    try:
        table = Measured.load(path)
    except (OSError, ValueError) as error:
        yield Fact("Measured", "table", False, f"{error}: run tpfuse tune")
        return
    stale = table.stale(machine("cuda"), detect("cuda", None).versions)
    detail = f"{table.digest}, {len(table.entries)} entries, {path}"
    yield Fact("Measured", "table", stale is None, f"{detail}; {stale.detail}" if stale else detail)


def _adapters() -> Iterator[Fact]:
    """Operators of engines that raising knows: a process has them once it has imported the engine."""
    for name, there in adapters.status().items():
        detail = "raised through its adapter" if there else "no such operator here: its adapter is off"
        yield Fact("Engines' operators", name, there, detail)


def _needs_gpu(name: str, there: bool, gpu: bool, good: str, missing: str) -> Fact:
    return Fact("Back ends", name, there and gpu, missing if not there else good if gpu else f"{good}; but no GPU is visible")


def _installed(*packages: str, extra: str) -> tuple[bool, str]:
    missing = [p for p in packages if version(p) is None]
    return not missing, f"missing {', '.join(missing)}: pip install 'tpfuse[{extra}]'" if missing else ", ".join(packages)
