"""An unpickler for files that others wrote: it builds data, and runs nothing that a file names.

Tensors, containers and plain values come out as they are. A module of torch's, of OpenAI's DALL-E
or of a TorchScript archive becomes a `StandIn` with its attributes. Any other name is refused.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dalle.errors import ForeignFileError

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

_MAX_DIMS, _MAX_SIZE = 64, 1 << 63  # torch's own
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")


class StandIn:
    """An object of a class that is not here: its attributes, never its code."""

    attributes: Mapping[str, object] = {}

    def __init__(self, *_: object) -> None:
        """Whatever the object was called with is dropped."""

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, Mapping) else {}

    def parts(self) -> list[Mapping[str, object]]:
        """Return what holds the tensors: a pickled module has them in three attributes."""
        if "_modules" not in self.attributes:
            return [self.attributes]
        found = (self.attributes.get(name) for name in _MODULE_PARTS)
        return [part for part in found if isinstance(part, Mapping)]


class Dropped(StandIn):
    """An object that has no weights: Lightning's settings refer to each other in circles."""

    def __setstate__(self, state: object) -> None:
        """The state is dropped."""


def num_values_of(shape: Sequence[int]) -> int:
    """Return the product of a shape. Raises ForeignFileError for what is no shape of a tensor."""
    if len(shape) > _MAX_DIMS or not all(
        isinstance(size, int) and 0 <= size < _MAX_SIZE for size in shape
    ):
        shown = ", ".join(
            str(size) if isinstance(size, int) and abs(size) < _MAX_SIZE else "…"
            for size in shape[:4]
        )
        more = ", …" if len(shape) > 4 else ""
        raise ForeignFileError(
            f"a tensor has the shape [{shown}{more}], and must have at most {_MAX_DIMS} "
            "dimensions, each from 0 to 2^63 - 1"
        )
    return math.prod(shape)


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    """Do what torch._utils._rebuild_tensor_v2 does, without gradients and hooks."""
    if num_values_of(size) > len(storage):
        raise ForeignFileError(
            f"a tensor of shape {tuple(size)} is larger than its storage of {len(storage)} values"
        )
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _rebuild_from_type(rebuild: object, _type: object, arguments: Any, *_: object) -> Tensor:
    """Do what torch._tensor._rebuild_from_type_v2 does, without the type and the attributes."""
    if rebuild is _rebuild_parameter:
        return _rebuild_parameter(*arguments)
    if rebuild is not _rebuild_tensor:
        raise ForeignFileError("it makes a tensor by something else than torch's own functions")
    return _rebuild_tensor(*arguments)


def _empty_ordered_dict() -> OrderedDict[object, object]:
    return OrderedDict()


def _empty_dict(*_: object) -> dict[object, object]:
    return {}


def _as_it_is(value: object, *_: object) -> object:
    return value


_ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _empty_ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,  # DeepSpeed's have attributes
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
    # In pickled modules: names of buffers, as a list here, and where the weights were.
    ("__builtin__", "set"): _as_it_is,
    ("builtins", "set"): _as_it_is,
    ("torch", "device"): _as_it_is,
    # Settings beside the weights: of LlamaGen's training, and in Lightning's files.
    ("argparse", "Namespace"): Dropped,
    ("collections", "defaultdict"): _empty_dict,
    ("typing", "Any"): Dropped,
    # Types and shapes beside DeepSpeed's shards.
    ("torch", "Tensor"): "torch.Tensor",
    ("torch.nn.parameter", "Parameter"): "torch.nn.Parameter",
    ("torch", "Size"): _as_it_is,
    **{
        (module, name): Dropped
        for module in ("__builtin__", "builtins")
        for name in ("dict", "int", "list")
    },
    # OpenAI's dVAE, and what its modules are made of.
    ("dall_e.encoder", "Encoder"): StandIn,
    ("dall_e.encoder", "EncoderBlock"): StandIn,
    ("dall_e.decoder", "Decoder"): StandIn,
    ("dall_e.decoder", "DecoderBlock"): StandIn,
    ("dall_e.utils", "Conv2d"): StandIn,
    ("torch.nn.modules.activation", "ReLU"): StandIn,
    ("torch.nn.modules.container", "Sequential"): StandIn,
    ("torch.nn.modules.linear", "Identity"): StandIn,
    ("torch.nn.modules.pooling", "MaxPool2d"): StandIn,
    ("torch.nn.modules.upsampling", "Upsample"): StandIn,
}
_MODULES_OF_TORCH = ("torch.nn.modules.", "torch.nn.functional")
"""Of a module that is dropped: its layers and its loss."""
_PACKAGES: dict[str, type[StandIn]] = {
    "__torch__": StandIn,  # modules of TorchScript archives
    "pytorch_lightning": Dropped,  # callbacks, whose classes are keys in its files
    "omegaconf": Dropped,
    "dalle_pytorch": Dropped,  # a whole VAE among the settings of early files
    "deepspeed": Dropped,  # its settings beside an optimiser's state
    "packaging": Dropped,
}


class Source(Protocol):
    """Where the pickle is read from."""

    def read(self, size: int) -> bytes: ...
    def readline(self) -> bytes: ...


ReadStorage = Callable[[torch.dtype, str, int], Tensor]
"""dtype, key and number of values of a storage -> its values [number]."""


class Unpickler(pickle._Unpickler):
    """The unpickler in Python: its memo is a dict, so that a number in the file takes no memory.

    Raises ForeignFileError for a name that is not allowed; a pickle of any content can raise
    anything else.
    """

    stack: list[Any]
    load_build: Callable[[], None]
    load_setitem: Callable[[], None]
    load_setitems: Callable[[], None]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES
    }

    def __init__(self, source: Source, read_storage: ReadStorage) -> None:
        super().__init__(source, encoding="utf-8")
        self._read_storage = read_storage

    def _build(self) -> None:
        """BUILD: a tensor's own __setstate__ could make it larger than its storage."""
        if isinstance(self.stack[-2], OrderedDict):
            self.stack.pop()  # the versions of its modules, which `state_dict` notes there
        elif isinstance(self.stack[-2], StandIn):
            self.load_build()
        else:
            raise ForeignFileError(f"it sets the state of a {type(self.stack[-2]).__name__}")

    def _set_items(self) -> None:
        """SETITEMS: to hash a tuple of tuples of a million would overflow the stack."""
        for key in self.stack[::2]:
            _check_key(key)
        self.load_setitems()

    def _set_item(self) -> None:
        _check_key(self.stack[-2])
        self.load_setitem()

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items

    def find_class(self, module: str, name: str) -> Any:
        if found := _PACKAGES.get(module.split(".")[0]):
            return found
        try:
            return _ALLOWED[module, name]
        except KeyError:
            if module.startswith(_MODULES_OF_TORCH):
                return Dropped
            raise ForeignFileError(
                f"it names {module}.{name}, which is neither a tensor nor a plain value"
            ) from None

    def persistent_load(self, pid: Any) -> object:
        kind, *rest = pid
        if kind == "module":  # torch before 1.6: a class, and its source
            return rest[0]
        dtype, key, _device, num_values = rest[:4]
        if kind == "storage" and isinstance(dtype, str):
            raise ForeignFileError(f"it names {dtype[:80]} in place of a type of storage")
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ForeignFileError(f"it refers to {str(kind)[:80]!r}, not to a storage")
        return self._read_storage(dtype, key, num_values)


def _check_key(key: object) -> None:
    if not isinstance(key, str | int) and key is not Dropped:
        raise ForeignFileError("it has a mapping whose keys are neither text nor numbers")
