"""Every private torch name that tpfuse uses, once.  tests/test_shim.py checks them on the torch that is installed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

__all__ = [
    "BackendCompilerFailed", "CustomGraphPass", "FakeTensor", "FakeTensorMode", "HigherOrderOperator", "OpOverload", "ShapeEnv",
    "TorchDynamoException", "detect_fake_mode", "enable_python_dispatcher",
]  # fmt: skip

CPU_ROW_SCALES = torch.__version__ >= torch.torch_version.TorchVersion("2.12")  # aten._scaled_mm on CPU takes a scale per row


@contextlib.contextmanager
def calling(module: torch.nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling the module is `call`, as after `nn.Module.compile`; inside `call` it is what it was."""
    name = "_compiled_call_impl"
    own = {name: vars(module)[name]} if name in vars(module) else {}

    def instead(*args: Any, **kwargs: Any) -> Any:
        restore()
        try:
            return call(*args, **kwargs)
        finally:
            vars(module)[name] = instead

    def restore() -> None:
        vars(module).pop(name, None)
        vars(module).update(own)

    vars(module)[name] = instead
    try:
        yield
    finally:
        restore()


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group of a c10d group name."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined]


def default_store() -> dist.Store:
    """The store that the default process group was built on."""
    return dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]


def join_fake_group(world: int) -> None:
    """Make this process rank 0 of a default process group whose other ranks do not exist: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)


def group_of(group: Any) -> dist.ProcessGroup:
    """A process group from itself, from its c10d name or from a one-dimensional DeviceMesh.  ValueError for a name that no group
    has, TypeError for anything else."""
    if isinstance(group, str):
        try:
            return resolve_group(group)
        except RuntimeError:
            raise ValueError(f"no process group is named {group!r}; pass the ProcessGroup itself") from None
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise TypeError(f"a mesh of one dimension is needed, got {group.mesh_dim_names or group.ndim}: mesh[name]")
        return group.get_group()
    if isinstance(group, dist.ProcessGroup):
        return group
    raise TypeError(f"group must be a ProcessGroup, a one-dimensional DeviceMesh or a name, got {type(group).__name__}")


def group_store(group: dist.ProcessGroup) -> dist.Store:
    """The store of the ranks of `group`."""
    return dist.distributed_c10d._get_process_group_store(group)  # type: ignore[attr-defined]


def symmetric_buffer(size: int, group: dist.ProcessGroup) -> tuple[Tensor, list[int], Any]:
    """A buffer of `size` bytes (int8, on the current CUDA device) that all ranks of `group` can write, an allocation of
    its own; the addresses of all ranks' buffers as mapped here; what keeps the mappings alive.  Collective.  No
    multicast object is created."""
    from torch._C._distributed_c10d import _SymmetricMemory

    disable_multicast()
    buffer = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.int8, torch.device("cuda", torch.cuda.current_device()))
    handle = _SymmetricMemory.rendezvous(buffer, group.group_name)
    offset = buffer.data_ptr() - handle.buffer_ptrs[handle.rank]
    return buffer, [address + offset for address in handle.buffer_ptrs], handle


def peer_views(buffer: Tensor, addresses: Sequence[int], handle: Any) -> list[Tensor]:
    """All ranks' buffers of `symmetric_buffer` as tensors of this device, `buffer` itself for this rank's."""

    def view(rank: int) -> Tensor:
        start = handle.get_buffer(rank, (1,), torch.int8, 0).data_ptr()
        return handle.get_buffer(rank, (buffer.numel(),), torch.int8, addresses[rank] - start)

    return [buffer if rank == handle.rank else view(rank) for rank in range(len(addresses))]


def async_tp(group: dist.ProcessGroup) -> dict[str, Any]:
    """The settings of Inductor under which torch's own passes overlap products with the reduce-scatters and all-gathers of
    `group` ("async TP"), which is made ready for it; without multicast."""
    import warnings

    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    disable_multicast()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # releases that call it needless still ask for it
        enable_symm_mem_for_group(group.group_name)
    return {"_micro_pipeline_tp": True}


@functools.cache
def cuda_library() -> Any:
    """The CUDA driver, by ctypes: looked up once, not at every launch."""
    import ctypes

    return ctypes.CDLL("libcuda.so.1")


def nvrtc(source: str, name: str, architecture: str, options: list[str]) -> bytes:
    """Machine code for an `extern "C"` kernel.  architecture: "90a".  RuntimeError with the compiler's messages."""
    import ctypes

    from torch.cuda._utils import _get_nvrtc_library

    library = _get_nvrtc_library()
    program = ctypes.c_void_p()
    flags = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *options]
    array = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
    try:
        if library.nvrtcCompileProgram(program, len(flags), array):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{name} does not compile:\n{log.value.decode()}")
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, image)
        return image.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def multiply_to_f32(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight of bf16, not rounded: FP32.  Elsewhere than on CUDA torch has no such product, and both are FP32."""
    return torch.mm(x, weight, out_dtype=torch.float32) if x.is_cuda else x @ weight


def multiply_in_blocks(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, square: bool, fast: bool, out: Tensor
) -> Tensor:
    """x @ weight, FP8, into `out`: scales by 1 x 128 columns of x, and by 128 x 128 blocks (square) or 128 x 1 of the weight."""
    from torch.nn.functional import ScalingType, SwizzleType

    plain, row = SwizzleType.NO_SWIZZLE.value, ScalingType.BlockWise1x128.value
    weight_by = ScalingType.BlockWise128x128.value if square else row
    return torch.ops.aten._scaled_mm_v2.out(
        x, weight, [x_scale], [row], [plain], [weight_scale], [weight_by], [plain], None, out.dtype, [], fast, out=out
    )


def disable_multicast() -> None:
    """From now on torch's symmetric memory creates no multicast objects, whoever allocates it."""
    import os

    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"


def fused_products() -> Any:
    """torch's operators that overlap a product with a collective, over symmetric memory."""
    import torch.distributed._symmetric_memory  # noqa: F401  registers them

    return torch.ops.symm_mem


def fused_products_workspace(group: str, size: int) -> Tensor:
    """Make the workspace of those operators for the group of that name `size` bytes large, if it is smaller.  Collective.  No
    multicast object is created.  → its memory, which torch gives back when it makes a larger one."""
    import torch.distributed._symmetric_memory as symmetric

    disable_multicast()
    symmetric.get_symm_mem_workspace(group, min_size=size)  # type: ignore[arg-type]
    return symmetric._group_name_to_workspace_tensor[group]  # type: ignore[index]


def device_pause(cycles: int) -> None:
    """Keep the current stream busy for about `cycles` clock cycles."""
    torch.cuda._sleep(cycles)


def compile_fx(gm: torch.fx.GraphModule, inputs: Sequence[Any], inner: Callable[..., Any], patches: dict[str, Any]) -> Any:
    """Inductor from the Dynamo level down, `inner` in place of its graph compiler, AOTAutograd's own cache off: with it on,
    another run's artifact of the same Dynamo graph would be executed and `inner` never called."""
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)


def compile_fx_inner(gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
    """Inductor on one lowered graph; returns a callable that takes (and clears) one list of inputs."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(gm, inputs, **kwargs)  # type: ignore[return-value]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions under its present settings, by operator."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def tracing_under(mode: FakeTensorMode) -> AbstractContextManager[Any]:
    """Inside, Inductor finds `mode` where Dynamo would have put its own; without one it does not use its cache."""
    return torch._guards.tracing(torch._guards.TracingContext(mode))


def recompiled_at_will() -> AbstractContextManager[Any]:
    """Inside, Dynamo captures code again however often it has before; outside it runs it uncompiled from some time on."""
    import torch._dynamo.config as config

    return config.patch(recompile_limit=1 << 30, accumulated_recompile_limit=1 << 30)  # type: ignore[attr-defined]


def cache_tag(tag: str) -> AbstractContextManager[Any]:
    """Inside, Inductor's cache keys hold `tag` beside the user's own."""
    import torch.compiler.config as compiler_config

    return compiler_config.patch(cache_key_tag=f"{compiler_config.cache_key_tag}{tag}")  # type: ignore[attr-defined]


def real_tensors() -> AbstractContextManager[Any]:
    """Inside, tensors are made and computed for real, whatever fake mode is on outside."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def allow_list_results(target: OpOverload) -> None:
    """Let Inductor call an operator that writes to an argument and returns a list: it asks for a rule of functionalisation, which
    the operators of final graphs never meet."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{target} stands in final graphs only")

    target.py_functionalize_impl(refuse)


def needs_exact_strides(target: Any) -> bool:
    """Whether an operator reads its inputs by the strides that it was traced with."""
    from torch._library.utils import get_layout_constraint_tag

    if not isinstance(target, OpOverload):
        return False
    return get_layout_constraint_tag(target) == torch.Tag.needs_exact_strides


def inductor_patch(patches: dict[str, Any]) -> AbstractContextManager[Any]:
    import torch._inductor.config as inductor_config

    return inductor_config.patch(patches) if patches else ExitStack()


def inductor_knows(option: str) -> bool:
    """Whether `option` is one of Inductor's own settings."""
    import torch._inductor.config as inductor_config

    return option.replace("-", "_") in inductor_config._config or "." in option  # type: ignore[attr-defined]


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings for a `mode` of torch.compile."""
    return dict(torch._inductor.list_mode_options(mode))


def fx_cache_on() -> bool:
    import torch._inductor.config as inductor_config

    return bool(inductor_config.fx_graph_cache) and not inductor_config.force_disable_caches


def symbols_of(value: Any) -> list[Any]:
    """The free sympy symbols of a SymInt or of a fake tensor's sizes and strides, sorted by name."""
    parts: list[Any] = [value] if isinstance(value, SymInt) else []
    if isinstance(value, Tensor):
        parts = [*value.shape, *value.stride(), value.storage_offset()]
    found = {s for p in parts if isinstance(p, SymInt) for s in p.node.expr.free_symbols}
    return sorted(found, key=str)


def traced_sizes(placeholders: Sequence[Any]) -> dict[Any, int]:
    """{symbol: the value it had when the graph was traced}."""
    sizes: dict[Any, int] = {}
    for value in placeholders:
        for part in (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,):
            if isinstance(part, SymInt) and part.node.expr.is_Symbol:
                sizes[part.node.expr] = part.node.hint
    return sizes


def traced(value: Any) -> int:
    """The value that a size had when the graph was traced; int() would make the graph one for this value alone."""
    return value.node.hint if isinstance(value, SymInt) else value


def expression(value: Any) -> Any:
    """The sympy expression of a SymInt; an int as it is."""
    return value.node.expr if isinstance(value, SymInt) else value


def without_guards(values: Sequence[Any]) -> AbstractContextManager[None]:
    """Inside, what is asked of the symbolic sizes of a graph with these inputs adds no guard: Dynamo has written its own by then,
    and the bounds of a size would go on to say what held for one call."""
    modes = [v.fake_mode for v in values if isinstance(v, FakeTensor)]
    env = modes[0].shape_env if modes else None
    return contextlib.nullcontext() if env is None else env.suppress_guards()


def symbol_bounds(value: SymInt, symbol: Any) -> tuple[int | None, int | None]:
    """The bounds that the graph's guards gave a symbol; None for none, a lower one of an integer that is no size."""
    bounds = value.node.shape_env.var_to_range[symbol]
    low, high = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
    return low, high


def fresh_symbol(env: ShapeEnv, name: str, hint: int, low: int | None, high: int | None) -> Any:
    """A new symbol of `env` for an integer between low and high whose value is now `hint`."""
    from torch._dynamo.source import ConstantSource

    endless: Any = torch.utils._sympy.numbers.int_oo  # type: ignore[attr-defined]
    positive = None if low is None else True  # None: of either sign
    symbol = env.create_symbol(
        hint, ConstantSource(name), DimDynamic.DYNAMIC, positive=positive, do_not_specialize_zero_one=True
    )  # fmt: skip
    env.constrain_symbol_range(symbol, -endless if low is None else low, endless if high is None else high)
    return symbol


def sym_int(env: ShapeEnv, expr: Any, hint: int) -> Any:
    return env.create_symintnode(expr, hint=hint)


def guards_of(mode: FakeTensorMode) -> list[Any]:
    """The conditions (sympy) under which what was compiled under `mode` is right."""
    return [g.expr for g in mode.shape_env.guards] if mode.shape_env else []


def opaque_object(value: Any) -> bool:
    """Whether a graph input is neither tensor nor number (a DeviceMesh or a process group that Dynamo passes along)."""
    return not isinstance(value, Tensor | SymInt | int | float | bool | torch.SymFloat | torch.SymBool) and value is not None


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Leave a text in torch's structured trace (TORCH_TRACE), which tlparse shows; nothing where tracing is off."""
    from torch._logging import trace_structured

    trace_structured("artifact", lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Ask Dynamo for a graph in which this dimension may have any size from 2 on."""
    torch._dynamo.mark_dynamic(tensor, dim)


def boxed(function: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """A callable that takes one list of arguments and clears it, as AOTAutograd passes them."""
    from torch._functorch.aot_autograd import make_boxed_func

    return make_boxed_func(function)


def pytree_leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def tree_map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, function, tree)


def auto_functionalized() -> Any:
    """The higher-order operator that calls an operator on copies of its buffers and returns what they hold then."""
    from torch._higher_order_ops.auto_functionalize import auto_functionalized

    return auto_functionalized


def dynamo_frame() -> tuple[int, bool]:
    """The number of the frame that Dynamo compiles now, counted from its last reset, and whether it was compiled before; none is
    compiled: -1."""
    now = torch._guards.CompileContext.current_compile_id()
    return (-1, False) if now is None or now.frame_id is None else (now.frame_id, bool(now.frame_compile_id))
