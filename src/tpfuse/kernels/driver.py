"""CUDA C++ compiled at run time (NVRTC) and launched with attributes that torch's own launcher has no argument for."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from tpfuse import shim

FOLDER = Path(__file__).parent / "cuda"
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


class Function:
    """A kernel whose one parameter is a struct."""

    def __init__(self, handle: ctypes.c_void_p, device: int) -> None:
        self._handle, self._device = handle, device

    def __call__(self, grid: int, block: int, early: bool, arguments: ctypes.Structure) -> None:
        """Launch `grid` blocks of `block` threads on the current stream.

        early: the launch may begin before the kernel ahead of it has ended (programmatic dependent launch).
        """
        attribute = _Attribute(id=_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        stream = torch.cuda.current_stream().cuda_stream
        config = _LaunchConfig((grid, 1, 1), (block, 1, 1), 0, stream, ctypes.pointer(attribute), int(early))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launch = shim.cuda_library().cuLaunchKernelEx
        result = launch(ctypes.byref(config), self._handle, parameters, None)
        if result == _INVALID_CONTEXT:
            _enter(self._device)
            result = launch(ctypes.byref(config), self._handle, parameters, None)
        _check(result)


@functools.cache
def compiled(sources: tuple[str, ...], name: str, flags: frozenset[tuple[str, str]], device: int) -> Function:
    """The kernel `name` of these files of `kernels/cuda`, one after another, compiled for a device, which is the current one.

    flags: macros and their values.
    """
    major, minor = torch.cuda.get_device_capability(device)
    image = shim.nvrtc(source_text(sources), name, f"{major}{minor}{'a' if major == 9 else ''}", defines(dict(flags)))
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    library = shim.cuda_library()
    _enter(device)
    _check(library.cuModuleLoadData(ctypes.byref(module), image))
    _check(library.cuModuleGetFunction(ctypes.byref(handle), module, name.encode()))
    return Function(handle, device)


def _enter(device: int) -> None:
    """Make torch's context current in a thread in which torch has not called CUDA yet."""
    library, context = shim.cuda_library(), ctypes.c_void_p()
    _check(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    _check(library.cuCtxSetCurrent(context))
    _check(library.cuDevicePrimaryCtxRelease(device))  # torch holds it


def source_text(sources: tuple[str, ...]) -> str:
    return "\n".join((FOLDER / source).read_text() for source in sources)


def defines(flags: Mapping[str, str]) -> list[str]:
    return [f"-D{name}={value}" for name, value in sorted(flags.items())]


def _check(result: int) -> None:
    if result != 0:
        text = ctypes.c_char_p()
        shim.cuda_library().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()} ({result})")
