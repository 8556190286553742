"""Launcher of Triton kernels that needs no C compiler.

Triton compiles C code for its launcher on the machine where it runs, which needs a compiler and
header files there. Here Triton makes the machine code only, and the CUDA driver's Python bindings,
which torch depends on, launch it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from cuda.bindings import driver
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
_INTEGER = "i32"
_ALIGNMENT = 16  # bytes; so aligned a pointer may be read in the widest words
_LAUNCHER_ARGUMENTS = 2  # pointers to scratch memory, of which these kernels use none
_SHARED_MEMORY = 48 * 1024  # bytes that a function may use without asking for more


class Kernel:
    """A kernel: `kernel[programs](x, out, m, WIDTH=512, num_warps=4)` runs on the current stream.

    Arguments are tensors and integers of 32 bits; those that the function declares as constexpr
    are keywords. Under Triton's interpreter it runs on the CPU.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function: Any = triton.jit(function)
        self._loaded: dict[object, _Loaded] = {}

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
        if not isinstance(self._function, JITFunction):
            interpreted: Callable[..., None] = self._function[programs]
            return interpreted

        def launch(*arguments: Any, num_warps: int = 4, **constants: Any) -> None:
            device = next(each.device for each in arguments if isinstance(each, Tensor))
            with torch.cuda.device(device):
                kinds = tuple((_type_of(each), _is_aligned(each)) for each in arguments)
                values = tuple((name, type(each), each) for name, each in constants.items())
                key = device, num_warps, kinds, values
                if key not in self._loaded:
                    major, minor = torch.cuda.get_device_capability(device)
                    target = GPUTarget("cuda", 10 * major + minor, 32)
                    compiled = self._compile(arguments, constants, num_warps, target)
                    self._loaded[key] = _Loaded.of(compiled, len(arguments))
                self._loaded[key].launch(programs, arguments)

        return launch

    def _compile(
        self,
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        num_warps: int,
        target: GPUTarget,
    ) -> Any:
        """Compile machine code for arguments of these types: Triton's compiled kernel."""
        names: list[str] = self._function.arg_names
        types = dict(zip(names, map(_type_of, arguments), strict=False))
        if types.keys() | constants.keys() != set(names) or types.keys() & constants.keys():
            raise TypeError(f"{self._function.__name__} takes {names}, got {[*types, *constants]}")
        aligned = [place for place, each in enumerate(arguments) if _is_aligned(each)]
        source = ASTSource(
            self._function,
            {name: types.get(name, "constexpr") for name in names},
            {(names.index(name),): each for name, each in constants.items()},
            {(place,): [["tt.divisibility", _ALIGNMENT]] for place in aligned},
        )
        return triton.compile(source, target=target, options={"num_warps": num_warps})


@dataclass(frozen=True)
class _Loaded:
    """Machine code in a device's memory."""

    function: Any
    threads: int
    shared_memory: int  # bytes

    @classmethod
    def of(cls, compiled: Any, num_arguments: int) -> _Loaded:
        """Load compiled code into the current device's memory."""
        _check_launch(compiled, num_arguments)
        name, metadata = compiled.metadata.name, compiled.metadata
        module = _checked(driver.cuModuleLoadData(compiled.asm["cubin"]))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        if metadata.shared > _SHARED_MEMORY:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, attribute, metadata.shared))
        return cls(function, 32 * metadata.num_warps, metadata.shared)

    def launch(self, programs: tuple[int, ...], values: Sequence[Any]) -> None:
        """Run on the current stream."""
        numbers = [each.data_ptr() if isinstance(each, Tensor) else each for each in values]
        types: list[Any] = [
            ctypes.c_void_p if isinstance(each, Tensor) else ctypes.c_int32 for each in values
        ]
        numbers += [0] * _LAUNCHER_ARGUMENTS
        types += [ctypes.c_void_p] * _LAUNCHER_ARGUMENTS
        grid = (*programs, 1, 1)[:3]
        stream = torch.cuda.current_stream().cuda_stream
        _checked(
            driver.cuLaunchKernel(
                self.function,
                *grid,
                self.threads,
                1,
                1,
                self.shared_memory,
                stream,
                (tuple(numbers), tuple(types)),
                0,
            )
        )


def _check_launch(compiled: Any, num_arguments: int) -> None:
    """Raise RuntimeError for a kernel that this version of Triton would launch differently.

    The hidden arguments of a kernel are not part of Triton's interface and may change.
    """
    name, metadata = compiled.metadata.name, compiled.metadata
    taken = len(re.findall(rf"\.param\b.*\b{name}_param_\d+,?$", compiled.asm["ptx"], re.MULTILINE))
    expected = num_arguments + _LAUNCHER_ARGUMENTS
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if taken != expected or scratch or metadata.num_ctas != 1:
        raise RuntimeError(
            f"kernels of Triton {triton.__version__} cannot be launched from here: {name} takes "
            f"{taken} arguments instead of {expected}, {scratch} bytes of scratch memory and "
            f"{metadata.num_ctas} blocks together"
        )


def _type_of(argument: Any) -> str:
    return _TYPES[argument.dtype] if isinstance(argument, Tensor) else _INTEGER


def _is_aligned(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.data_ptr() % _ALIGNMENT == 0


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a driver function returns beside its status.

    Raises RuntimeError for a status other than success.
    """
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"the CUDA driver says {status.name}")
    return values[0] if values else None
