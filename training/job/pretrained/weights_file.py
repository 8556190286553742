"""Tensors of files that others wrote: the one way in for weights that are not an artefact of ours.

    file of torch.save, TorchScript archive, safetensors -> {dotted name: tensor}, and plain values

Nothing in a file is executed: see `training.job.pretrained.unpickler`. What a file declares is
compared with what it has before memory is taken.
"""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dalle.artefact import not_finite
from dalle.errors import ForeignFileError
from training.job.pretrained.unpickler import StandIn, Unpickler

WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

# A pickle lists names and shapes. The largest published one here (1.3 billion weights) has 0.2 MB.
MAX_PICKLE_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_ENTRIES = 200_000  # a checkpoint with its optimiser's state has some 10,000
MAX_NAME_LENGTH = 1_000
MAX_SHARING = 4  # bytes of the parts of storages that differ, for each byte of the file
MAX_COPIES = 128  # bytes of all tensors, likewise: shared layers stand once for each layer

# torch before 1.6 wrote five pickles in a row, then the storages. The first two are these numbers.
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class Weights:
    """What a file holds, by dotted names: tensors on the CPU, and numbers, truth values, texts.

    The entries of a list are named by their numbers.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, bool | int | float | str | None] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin so, without that beginning."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def whole_number(self, name: str, *, at_least: int) -> int:
        """Return a value. Raises ValueError where it is missing or is no such number."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ValueError(f"{name} must be a whole number from {at_least}, got {value!r}")
        return value


def shape_of(state: Mapping[str, Tensor], name: str, num_dims: int) -> tuple[int, ...]:
    """Return the shape of a weight, sizes from 1. Raises LookupError or ValueError."""
    shape = (*state[name].shape,)
    if len(shape) != num_dims or 0 in shape:
        raise ValueError(
            f"the weight {name} must have {num_dims} dimensions, none of them 0, and has the "
            f"shape {[*shape]}"
        )
    return shape


def to_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in float32.

    Raises ValueError naming a weight of truth values, one that is NaN or infinite, or one with
    values beyond the range.
    """
    for name, value in state.items():
        if value.dtype == torch.bool:
            raise ValueError(f"the weight {name} has the type torch.bool, and must have numbers")
    if infinite := not_finite(state):
        raise ValueError(f"the weight {infinite} has values that are not finite")
    copies = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    wide = {name: copies[name] for name, each in state.items() if each.dtype == torch.float64}
    if infinite := not_finite(wide):
        raise ValueError(f"the weight {infinite} has values that float32 cannot hold")
    return copies


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their dotted names. Raises what `read_weights` does."""
    return read_weights(path).tensors


def missing_words(error: LookupError) -> str:
    """Return what a weight that is not there, or has too few dimensions, is to be refused with."""
    if isinstance(error, KeyError):
        return f"there is no weight {error}"
    return f"a weight has too few dimensions: {error}"


def read_weights(path: Path) -> Weights:
    """Return the tensors and plain values of a file, in the types of the file.

    Whether they are finite is checked of those that are used: files of training also hold the
    state of an optimiser. Raises `ForeignFileError` when the file is damaged, is none of these
    formats, asks for code to run, or has weights that are complex, or floating numbers of one byte.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ForeignFileError("it is not a regular file")
        weights = _read(path)
    except OSError as error:
        raise ForeignFileError(f"{path.name} cannot be read: {error.strerror}") from error
    except ForeignFileError as error:
        raise ForeignFileError(f"{path.name} cannot be read as weights: {error}") from error
    size = path.stat().st_size
    num_bytes = sum(tensor.nbytes for tensor in weights.tensors.values())
    # The same part of a storage under several names is one weight that is shared.
    parts = {
        (each.data_ptr(), each.dtype, each.shape, each.stride()): each.nbytes
        for each in weights.tensors.values()
    }
    if num_bytes > MAX_COPIES * size or sum(parts.values()) > MAX_SHARING * size:
        raise ForeignFileError(
            f"{path.name}: {num_bytes} bytes of tensors share the storages of {size} bytes"
        )
    for name, tensor in weights.tensors.items():
        # torch computes nothing with the latter, and drops half of the former.
        is_byte = tensor.is_floating_point() and tensor.itemsize == 1
        if tensor.is_complex() or is_byte:
            raise ForeignFileError(
                f"{path.name}: the weight {name} has the type {tensor.dtype}, and must have "
                f"float16, bfloat16, float32 or float64"
            )
    return weights


def _read(path: Path) -> Weights:
    try:
        if path.suffix == ".safetensors":
            return Weights(safetensors.torch.load_file(path))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = _Archive(archive, path.stat().st_size).load()
        else:
            with path.open("rb") as file:
                content = _OldFile(file, path.stat().st_size).load()
    except (ForeignFileError, OSError):
        raise
    except (SafetensorError, zipfile.BadZipFile) as error:
        raise ForeignFileError(f"it is damaged: {error}") from error
    # A pickle of any content can raise anything: a wrong argument, a missing place on the stack.
    except Exception as error:
        raise ForeignFileError(
            f"neither an archive of torch's nor safetensors: {type(error).__name__}"
        ) from error
    collector = _Collector()
    collector.add(content, "", MAX_DEPTH)
    return collector.weights


class _Collector:
    """Tensors and plain values of nested mappings and modules, by their dotted names."""

    def __init__(self) -> None:
        self.weights = Weights()
        self._entries_left = MAX_ENTRIES

    def add(self, value: object, name: str, depth: int) -> None:
        """Add what a value holds. Mappings may hold others many times over, so all is bounded."""
        self._entries_left -= 1
        if self._entries_left < 0 or len(name) > MAX_NAME_LENGTH:
            raise ForeignFileError(
                f"it has more than {MAX_ENTRIES:,} entries, or one whose name has more than "
                f"{MAX_NAME_LENGTH:,} characters"
            )
        if isinstance(value, Tensor):
            self.weights.tensors[name] = value
        elif value is None or isinstance(value, bool | int | float | str):
            self.weights.values[name] = value
        elif isinstance(value, StandIn):
            for part in value.parts():
                self.add(part, name, depth)
        elif isinstance(value, Mapping | list | tuple):
            if depth == 0:
                raise ForeignFileError(f"modules lie more than {MAX_DEPTH} deep in each other")
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, inner in items:
                self.add(inner, f"{name}.{key}" if name else str(key), depth - 1)


class _Archive:
    """A zip file of torch.save or torch.jit.save: a pickle, and the bytes of each storage."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._size = size
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ForeignFileError("the archive has two members of a name")
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ForeignFileError(f"the archive has {len(roots)} members named data.pkl, not one")
        self._root = roots[0]
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
        self._num_bytes = 0

    def load(self) -> object:
        """Return what the pickle holds."""
        if f"{self._root}byteorder" in self._archive.namelist():
            order = self._member("byteorder", 16)
            if order != b"little":
                raise ForeignFileError(f"byte order {order!r}; only b'little' can be read")
        pickled = io.BytesIO(self._member("data.pkl", MAX_PICKLE_BYTES))
        return Unpickler(pickled, self._storage).load()

    def _member(self, name: str, max_bytes: int) -> bytes:
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ForeignFileError(
                f"the member {name} is compressed; torch stores members as they are"
            )
        if info.file_size > max_bytes:
            raise ForeignFileError(
                f"the member {name} has {info.file_size} bytes, more than {max_bytes}"
            )
        return self._archive.read(info)

    def _storage(self, dtype: torch.dtype, key: str, num_values: int) -> Tensor:
        """Return the values of a storage, [num_values]."""
        if (key, dtype) not in self._storages:
            content = bytearray(self._member(f"data/{key}", self._size - self._num_bytes))
            self._num_bytes += len(content)
            if len(content) != num_values * dtype.itemsize:
                raise ForeignFileError(
                    f"the member data/{key} has {len(content)} bytes, not {num_values} values of "
                    f"{dtype}"
                )
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0).to(dtype)
            self._storages[key, dtype] = values
        return self._storages[key, dtype]


class _OldFile:
    """A file of torch before 1.6: five pickles in a row, then the storages in the fifth's order.

    The third pickle tells the machine, the fourth is the content, the fifth lists the storages.
    """

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        self._file = file
        self._pickles_left = MAX_PICKLE_BYTES
        self._storages_left = size
        self._storages: dict[str, Tensor] = {}

    def load(self) -> object:
        """Return what the fourth pickle holds."""
        if self._unpickle() != _OLD_MAGIC or self._unpickle() != _OLD_VERSION:
            raise ForeignFileError("neither an archive of torch's nor safetensors")
        machine = self._unpickle()
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise ForeignFileError("it is of a machine of another byte order")
        content, keys = self._unpickle(), self._unpickle()
        if not isinstance(keys, list) or sorted(keys) != sorted(self._storages):
            raise ForeignFileError("it lists other storages than its tensors have")
        for key in keys:
            values = self._storages[key]
            if int.from_bytes(self._file.read(8), "little") != len(values):
                raise ForeignFileError(f"its storage {key} has not {len(values)} values")
            if self._file.readinto(values.view(torch.uint8).numpy().data) != values.nbytes:
                raise ForeignFileError(f"it is damaged: it ends in the storage {key}")
        return content

    def _unpickle(self) -> object:
        return Unpickler(self, self._storage).load()

    def read(self, size: int) -> bytes:
        """Read a part of a pickle, for the unpickler."""
        return self._counted(self._file.read(min(size, self._pickles_left + 1)))

    def readline(self) -> bytes:
        """Read a line of a pickle, for the unpickler."""
        return self._counted(self._file.readline(self._pickles_left + 1))

    def _counted(self, content: bytes) -> bytes:
        self._pickles_left -= len(content)
        if self._pickles_left < 0:
            raise ForeignFileError(f"its pickles have more than {MAX_PICKLE_BYTES} bytes")
        return content

    def _storage(self, dtype: torch.dtype, key: str, num_values: int) -> Tensor:
        """Return room for the values of a storage, [num_values], which are read later."""
        if key not in self._storages:
            self._storages_left -= num_values * dtype.itemsize
            if num_values < 0 or self._storages_left < 0:
                raise ForeignFileError("its storages have more bytes than the file")
            self._storages[key] = torch.zeros(num_values, dtype=dtype)
        if self._storages[key].dtype != dtype:
            raise ForeignFileError(f"its storage {key} has two types")
        return self._storages[key]
