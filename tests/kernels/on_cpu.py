"""The CUDA C++ kernels run on a CPU, for all ranks at once (on_cpu.hpp): each inline assembly becomes a call, the rest is
compiled as it stands.  What the launchers would launch is recorded first."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tpfuse.kernels import arrive, cuda_norm, cuda_sharded, driver, product_scatter
from tpfuse.kernels.channel import Channel
from tpfuse.kernels.cuda_norm import Args, literals, macros_of, sources_of
from tpfuse.kernels.plan import ChannelLayout

FOLDER = Path(__file__).parent
COMPILER = shutil.which("g++")
PTX = {
    "griddepcontrol.wait;": "none", "griddepcontrol.launch_dependents;": "none", "trap;": "trap",
    "fence.acq_rel.sys;": "fence", "mov.u64 %0, %%globaltimer;": "clock",
    "st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};": "store", "st.relaxed.sys.global.v2.b32 [%0], {%1, %2};": "store",
    "st.relaxed.sys.global.b32 [%0], %1;": "store", "st.relaxed.sys.global.u32 [%0], %1;": "store",
    "ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];": "load", "ld.relaxed.sys.global.v2.b32 {%0, %1}, [%2];": "load",
    "ld.relaxed.sys.global.b32 %0, [%1];": "load", "ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];": "load",
    "ld.relaxed.gpu.global.u32 %0, [%1];": "load", "ld.acquire.sys.global.u32 %0, [%1];": "load",
    "st.relaxed.gpu.global.v4.b32 [%0], {%1, %1, %1, %1};": "store_same<4>",
    "st.relaxed.gpu.global.v2.b32 [%0], {%1, %1};": "store_same<2>", "st.relaxed.gpu.global.b32 [%0], %1;": "store_same<1>",
    "atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;": "add_one",
    "cvt.rn.f16x2.f32 %0, %2, %1;": "to_bf16x2", "cvt.rn.bf16x2.f32 %0, %2, %1;": "to_bf16x2",
    "cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;": "to_e4m3x2", "cvt.rn.f16x2.e4m3x2 %0, %1;": "from_e4m3x2",
    "{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }": "from_half",
    "{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }": "none_for_half",
}  # fmt: skip


def translated(source: str) -> str:
    """C++ for a CPU.  KeyError for assembly that on_cpu.hpp does not have."""

    def call(match: re.Match[str]) -> str:
        operands = re.findall(r'"=?[rlfh]"\(((?:[^()"]|\([^()"]*(?:\([^()"]*\)[^()"]*)*\))*)\)', match[2])
        return f"ptx::{PTX[match[1]]}({', '.join(operands)});"

    source = re.sub(r'asm(?: volatile)?\(\s*"([^"]*)"\s*(.*?)\);', call, source, flags=re.DOTALL)
    source = source.replace("__shared__ float partial[2][WARPS];", "typedef float P[2][WARPS]; P &partial = SHARED(P);")
    return source.replace("__shared__ bool last;", "bool &last = SHARED(bool);")


@functools.cache
def library(sources: tuple[str, ...], name: str, macros: frozenset[tuple[str, str]], broken: tuple[str, str] = ("", "")) -> Any:
    """A kernel with the function `run` of on_cpu_run.hpp.  broken: text of its source, and what stands there instead."""
    source = driver.source_text(sources)
    assert broken[0] in source
    folder = Path(tempfile.mkdtemp(prefix="tpfuse-on-cpu-"))
    parts = [f'#include "{FOLDER}/on_cpu.hpp"', translated(source.replace(*broken)), f'#include "{FOLDER}/on_cpu_run.hpp"']
    (folder / "kernel.cpp").write_text("\n".join(parts))
    known = {key: value for key, value in dict(macros).items() if key != "RANK"}
    flags = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", f"-DKERNEL={name}", *driver.defines(known)]
    command = [str(COMPILER), *flags, str(folder / "kernel.cpp"), "-o", str(folder / "kernel.so")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(folder / "kernel.so"))
    shutil.rmtree(folder)
    return loaded


class Machine:
    """Launches, put down instead of made: by rank, each with its grid and arguments."""

    def __init__(self, monkeypatch: Any, world: int, blocks: int) -> None:
        """blocks: of a grid at most."""
        self.world, self.blocks = world, blocks
        self.launches: list[list[tuple[int, Args]]] = [[] for _ in range(world)]
        self.kernel: tuple[Any, ...] = ()
        self.threads = 0
        for module in (cuda_norm, cuda_sharded, product_scatter):
            monkeypatch.setattr(module, "kernel_of", self._norm_kernel)
        monkeypatch.setattr(arrive, "_kernel", self._kernel)

    def _norm_kernel(self, name: str, call: Any, link: Any, plan: Any, **flags: Any) -> Callable[..., None]:
        macros = macros_of(call, 0, link.world, plan, **flags)
        return self._launcher((sources_of(name), name, macros), link.rank)

    def _kernel(self, name: str, rank: int, world: int, device: Any) -> Callable[..., None]:
        return self._launcher((arrive.SOURCES, name, literals({"WORLD": world})), rank)

    def _launcher(self, kernel: tuple[Any, ...], rank: int) -> Callable[..., None]:
        def launch(grid: int, block: int, early: bool, args: Args) -> None:
            assert self.kernel in ((), kernel), "one kernel at a time"
            self.kernel, self.threads = kernel, block
            self.launches[rank].append((min(grid, self.blocks), Args.from_buffer_copy(args)))

        return launch

    def run(self, seed: int, broken: tuple[str, str] = ("", ""), silent: int = -1, limit: int = 30_000_000) -> None:
        """What was put down, all ranks side by side but for a silent one.  RuntimeError where it does not come to an end."""
        count = len(self.launches[0])
        assert all(len(own) == count for own in self.launches), "ranks launch alike"
        every = [launch for own in self.launches for launch in own]
        grids = (ctypes.c_int * len(every))(*(0 if i // count == silent else grid for i, (grid, _) in enumerate(every)))
        args = (Args * len(every))(*(args for _, args in every))
        run = library(*self.kernel, broken).run
        run.argtypes = [*[ctypes.c_int] * 2, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_longlong]
        said = run(self.world, count, grids, self.threads, args, seed, limit)
        self.launches, self.kernel = [[] for _ in range(self.world)], ()
        if said:
            raise RuntimeError("a kernel gave up" if said == 1 else "no end")


def channels(world: int, max_tokens: int, hidden: int, timeout: float = 1e9) -> list[Channel]:
    """Of ranks in one process, each with its buffer.  timeout: in millions of polls, of all threads."""
    layout = ChannelLayout.of(world, max_tokens, hidden, 2)
    made = [Channel.create(rank, world, layout, torch.device("cpu"), 1, timeout) for rank in range(world)]
    buffers = [torch.empty(layout.total, dtype=torch.int8) for _ in range(world)]
    for channel, buffer in zip(made, buffers, strict=True):
        channel.connect(buffer, [b.data_ptr() for b in buffers])
        channel.__dict__["kept"] = buffer
    return made
