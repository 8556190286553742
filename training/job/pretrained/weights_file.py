"""Tensors of files that others wrote: the one way in for weights that are not an artefact of ours.

    archive of torch.save or TorchScript, safetensors -> {dotted name: tensor}

Nothing in a file is executed: an unpickler with an allow-list builds tensors, containers and plain
values, and a module becomes the names and tensors that it holds. What a file declares is compared
with what it has before memory is taken.
"""

from __future__ import annotations

import io
import math
import pickle
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dalle.artefact import not_finite
from dalle.errors import ArtefactError

WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

# What torch writes, in the protocols 2 to 4. No sets, no byte arrays, no classes with arguments.
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2,
    pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.SETITEM, pickle.SETITEMS, pickle.APPEND, pickle.APPENDS,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
    pickle.BINPERSID,
)  # fmt: skip

# A pickle lists names and shapes. The largest published one here (1.3 billion weights) has 0.2 MB.
MAX_PICKLE_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_SHARING = 4  # bytes of all tensors, for each byte of the file; tied weights stand twice

_STORAGE_TYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their dotted names, on the CPU, in the types of the file.

    Numbers, strings and other values beside the tensors are left out. Raises `ArtefactError` when
    the file is damaged, is none of these formats, asks for code to run, or has weights that are NaN
    or infinite.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ArtefactError("it is not a regular file")
        tensors = _read(path)
    except OSError as error:
        raise ArtefactError(f"{path.name} cannot be read: {error.strerror}") from error
    except ArtefactError as error:
        raise ArtefactError(f"{path.name} cannot be read as weights: {error}") from error
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if num_bytes > MAX_SHARING * path.stat().st_size:
        raise ArtefactError(
            f"{path.name}: {num_bytes} bytes of tensors share the storages of "
            f"{path.stat().st_size} bytes"
        )
    if name := not_finite(tensors):
        raise ArtefactError(f"{path.name}: the weight {name} has values that are not finite")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = _Archive(archive, path.stat().st_size).load()
        else:
            # torch before 1.6 wrote a row of pickles. torch reads them with an allow-list too.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (ArtefactError, OSError):
        raise
    except (SafetensorError, zipfile.BadZipFile) as error:
        raise ArtefactError(f"it is damaged: {error}") from error
    # A pickle of any content can raise anything: a wrong argument, a missing place on the stack.
    except Exception as error:
        raise ArtefactError(
            f"neither an archive of torch's nor safetensors: {type(error).__name__}"
        ) from error
    tensors: dict[str, Tensor] = {}
    _collect(content, "", tensors, MAX_DEPTH)
    return tensors


def _collect(value: object, name: str, into: dict[str, Tensor], depth: int) -> None:
    if isinstance(value, Tensor):
        into[name] = value
    elif isinstance(value, _Module):
        _collect(value.attributes, name, into, depth)
    elif isinstance(value, Mapping):
        if depth == 0:
            raise ArtefactError(f"modules lie more than {MAX_DEPTH} deep in each other")
        for key, inner in value.items():
            _collect(inner, f"{name}.{key}" if name else str(key), into, depth - 1)


class _Module:
    """A module of a TorchScript archive: its attributes, never its code."""

    def __init__(self) -> None:
        self.attributes: Mapping[str, object] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, Mapping) else {}


class _Archive:
    """A zip file of torch.save or torch.jit.save: a pickle, and the bytes of each storage."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._size = size
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ArtefactError("the archive has two members of a name")
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ArtefactError(f"the archive has {len(roots)} members named data.pkl, not one")
        self._root = roots[0]
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
        self._num_bytes = 0

    def load(self) -> object:
        """Return what the pickle holds."""
        if f"{self._root}byteorder" in self._archive.namelist():
            order = self._member("byteorder", 16)
            if order != b"little":
                raise ArtefactError(f"byte order {order!r}; only b'little' can be read")
        return _Unpickler(self._member("data.pkl", MAX_PICKLE_BYTES), self._storage).load()

    def _member(self, name: str, max_bytes: int) -> bytes:
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ArtefactError(
                f"the member {name} is compressed; torch stores members as they are"
            )
        if info.file_size > max_bytes:
            raise ArtefactError(
                f"the member {name} has {info.file_size} bytes, more than {max_bytes}"
            )
        return self._archive.read(info)

    def _storage(self, dtype: torch.dtype, key: str, num_values: int) -> Tensor:
        """Return the values of a storage, [num_values]."""
        if (key, dtype) not in self._storages:
            content = bytearray(self._member(f"data/{key}", self._size - self._num_bytes))
            self._num_bytes += len(content)
            if len(content) != num_values * dtype.itemsize:
                raise ArtefactError(
                    f"the member data/{key} has {len(content)} bytes, not {num_values} values of "
                    f"{dtype}"
                )
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0).to(dtype)
            self._storages[key, dtype] = values
        return self._storages[key, dtype]


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    """Do what torch._utils._rebuild_tensor_v2 does, without gradients and hooks."""
    if math.prod(size) > len(storage):
        raise ArtefactError(
            f"a tensor of shape {tuple(size)} is larger than its storage of {len(storage)} values"
        )
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _empty_ordered_dict() -> OrderedDict[object, object]:
    return OrderedDict()


def _as_it_is(value: object, *_: object) -> object:
    return value


_ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _empty_ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGE_TYPES.items()},
    **{
        ("torch.jit._pickle", name): _as_it_is
        for name in (
            "build_boollist",
            "build_doublelist",
            "build_intlist",
            "build_tensorlist",
            "restore_type_tag",
        )
    },
}


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python: its memo is a dict, so that a number in the file takes no memory."""

    stack: list[Any]
    load_build: Callable[[], None]
    load_setitem: Callable[[], None]
    load_setitems: Callable[[], None]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES
    }

    def __init__(
        self, content: bytes, read_storage: Callable[[torch.dtype, str, int], Tensor]
    ) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._read_storage = read_storage

    def _build(self) -> None:
        """BUILD: a tensor's own __setstate__ could make it larger than its storage."""
        if isinstance(self.stack[-2], OrderedDict):
            self.stack.pop()  # the versions of its modules, which `state_dict` notes there
        elif isinstance(self.stack[-2], _Module):
            self.load_build()
        else:
            raise ArtefactError(f"it sets the state of a {type(self.stack[-2]).__name__}")

    def _set_items(self) -> None:
        """SETITEMS: to hash a tuple of tuples of a million would overflow the stack."""
        keys = self.stack[::2]
        if not all(isinstance(key, str | int) for key in keys):
            raise ArtefactError("it has a mapping whose keys are neither text nor numbers")
        self.load_setitems()

    def _set_item(self) -> None:
        if not isinstance(self.stack[-2], str | int):
            raise ArtefactError("it has a mapping whose keys are neither text nor numbers")
        self.load_setitem()

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise ArtefactError(
                f"it names {module}.{name}, which is neither a tensor nor a plain value"
            ) from None

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, num_values = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ArtefactError(f"it refers to {str(kind)[:80]!r}, not to a storage")
        return self._read_storage(dtype, key, num_values)
