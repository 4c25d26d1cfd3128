"""What Triton's compiler makes of a launcher's kernels for sm_90, without a GPU: registers, spills, code at each stage.

`compiled(launch)` runs a launcher on tensors made by `cuda`, which have no memory, and compiles what it would have launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tpfuse.shim import FakeTensor, FakeTensorMode

SM = 90
_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One kernel.  ttgir, ptx: its code.  registers, spilled (bytes stored): of a thread, by ptxas.  shared: bytes of a block."""

    name: str
    ttgir: str
    ptx: str
    registers: int
    spilled: int
    shared: int

    def shuffles(self) -> list[str]:
        """The lines of TTGIR that move a tensor from one layout to another, through shared memory unless they are warp-local."""
        return [line.strip() for line in self.ttgir.splitlines() if "ttg.convert_layout" in line or "ttg.local_store" in line]


@cache
def _ptxas() -> str | None:
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    return str(path) if path.exists() else None


def missing() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    try:
        return None if _ptxas() else "Triton's ptxas is missing"
    except ImportError:
        return "Triton is missing"


@cache
def _mode() -> FakeTensorMode:
    return FakeTensorMode()


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A CUDA tensor without memory."""
    with _mode():
        return torch.empty(shape, dtype=dtype, device="cuda:0")


def compiled(launch: Callable[[], Any]) -> list[Compiled]:
    """Every kernel that `launch` launches, in order, compiled in place of being run."""
    from triton.runtime.jit import JITFunction

    found: list[Compiled] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(_compile(self, args, kwargs))

    with patch.object(JITFunction, "run", run), patch.object(FakeTensor, "data_ptr", lambda self: 0):
        launch()
    return found


def _compile(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [p.name for p in kernel.params]
    values = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
    values = {p.name: values.get(p.name, p.default) for p in kernel.params}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        signature[param.name] = "constexpr" if param.is_constexpr else _type_of(value, param.do_not_specialize)
        if signature[param.name] == "constexpr":
            constants[(index,)] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in kwargs.items() if k not in names}
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", SM, 32), options=options)
    registers, spilled = _usage(built.asm["ptx"])
    return Compiled(kernel.__name__, built.asm["ttgir"], built.asm["ptx"], registers, spilled, built.metadata.shared)


def _type_of(value: Any, unspecialised: bool) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if hasattr(value, "block_shape"):  # a host's tensor descriptor
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value == 1 and not unspecialised else "i32" if -(2**31) <= value < 2**31 else "i64"


def _usage(ptx: str) -> tuple[int, int]:
    """(registers, bytes of spill stores) by `ptxas -v`, whose report looks like "Used 40 registers"."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = re.search(r"\.target (\w+)", ptx)
        assert arch is not None
        command = [str(_ptxas()), "-v", f"--gpu-name={arch[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (re.findall(pattern, said) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return max(map(int, registers)), sum(map(int, spilled))
