"""training.job.pretrained.weights_file: tensors come out, and nothing in a file is executed."""

import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from torch import nn

from dalle.errors import ArtefactError, ForeignFileError
from training.job.pretrained.unpickler import num_values_of
from training.job.pretrained.weights_file import MAX_DEPTH, read_tensors, to_float32


def state():
    """Tensors of several types: one with a storage in common, one not contiguous, one empty."""
    base = torch.arange(12.0).view(3, 4)
    return {
        "layer.weight": base,
        "layer.transposed": base.T,
        "layer.row": base[1],
        "half": torch.ones(3, dtype=torch.float16),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 2),
        "mask": torch.tensor([True, False]),
    }


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin"])
def test_a_state_dict_of_torch_is_read(tmp_path, name, protocol):
    saved = OrderedDict(state()) | {"numbers": [1, 2.5, None, "text", (3,)], "epoch": 3}
    torch.save(saved, tmp_path / name, pickle_protocol=protocol)
    assert_same(read_tensors(tmp_path / name), state())


def test_a_state_dict_as_a_module_gives_it_is_read(tmp_path):
    """It is an OrderedDict with an attribute of its own."""
    expected = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    assert hasattr(expected, "_metadata")
    torch.save(expected, tmp_path / "model.pt")
    assert_same(read_tensors(tmp_path / "model.pt"), expected)


def test_a_state_dict_of_torch_before_1_6_is_read(tmp_path):
    torch.save(state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read_tensors(tmp_path / "old.pt"), state())


def test_safetensors_are_read(tmp_path):
    tensors = {name: tensor.contiguous().clone() for name, tensor in state().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(read_tensors(tmp_path / "model.safetensors"), tensors)


def test_parameters_and_dictionaries_in_dictionaries_have_dotted_names(tmp_path):
    content = {"config": {"width": 3}, "weights": {"a": nn.Parameter(torch.ones(2)), 4: state()}}
    torch.save(content, tmp_path / "model.pt")
    tensors = read_tensors(tmp_path / "model.pt")
    assert_same(
        tensors,
        {"weights.a": torch.ones(2)} | {f"weights.4.{name}": t for name, t in state().items()},
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.scale = nn.Parameter(torch.ones(2))
        self.sizes = [1, 2, 3]
        self.register_buffer("codes", torch.arange(5))

    def forward(self, images):
        return self.blocks(images).mean() * self.scale + sum(self.sizes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_archive_gives_its_state_dict(tmp_path, how):
    net = Net().eval()
    archive = (
        torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.ones(1, 1, 9, 9))
    )
    archive.save(str(tmp_path / "net.pt"))
    assert_same(read_tensors(tmp_path / "net.pt"), net.state_dict())


class Conv2d(nn.Module):
    """A module of another package, as OpenAI's dVAE has them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("codes", torch.arange(5))
        self.device, self.size = torch.device("cpu"), 3


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code for container")
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickled_module_gives_its_state_dict(tmp_path, monkeypatch, is_zip):
    for name in ("dall_e", "dall_e.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["dall_e.utils"], "Conv2d", Conv2d, raising=False)
    monkeypatch.setattr(Conv2d, "__module__", "dall_e.utils")
    net = nn.Sequential(OrderedDict(first=Conv2d(), rest=nn.Sequential(nn.ReLU(), Conv2d())))
    torch.save(net, tmp_path / "net.pkl", _use_new_zipfile_serialization=is_zip)
    assert_same(read_tensors(tmp_path / "net.pkl"), net.state_dict())


class Writes(nn.Module):
    """A module whose TorchScript code runs as it is loaded."""

    def __init__(self):
        super().__init__()
        self.values = torch.ones(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return (torch.ones(1), self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.values = torch.from_file("OWNED", True, 16)
        self.training = state[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_code_of_a_torchscript_archive_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Writes()).save("evil.pt")
    assert read_tensors(Path("evil.pt")) == {}
    assert not Path("OWNED").exists()
    torch.jit.load("evil.pt")
    assert Path("OWNED").exists(), "the archive of this test would not have run code anyway"


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("function", [os.system, shutil.rmtree, exec, torch.load, torch.hub.load])
def test_a_pickle_that_calls_something_is_refused_by_its_name(tmp_path, function):
    torch.save(Calls(function, "touch owned"), tmp_path / "evil.pt")
    says = (
        rf"evil\.pt cannot be read as weights: it names .*{function.__name__}.*, which is neither"
    )
    with pytest.raises(ArtefactError, match=says):
        read_tensors(tmp_path / "evil.pt")


def archive(path, pickled, storages=(), **members):
    """An archive as torch.save writes it, of any pickle and any storages."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled, members.get("compress"))
        for key, content in enumerate(storages):
            file.writestr(f"a/data/{key}", content)
        if "byteorder" in members:
            file.writestr("a/byteorder", members["byteorder"])
    return path


def tensor(num_values, size, stride, *, type_name=b"FloatStorage", key=b"0", offset=0):
    """The pickle of {"x": a tensor} of that storage, shape and layout, whatever they are."""

    def numbers(values):
        return b"(" + b"".join(pickle.dumps(value, 2)[2:-1] for value in values) + b"t"

    return (
        b"\x80\x02}X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n"
        + type_name
        + b"\nX"
        + struct.pack("<I", len(key))
        + key
        + b"X\x03\0\0\0cpu"
        + pickle.dumps(num_values, 2)[2:-1]
        + b"tQ"
        + pickle.dumps(offset, 2)[2:-1]
        + numbers(size)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def test_the_pickle_of_these_tests_is_that_of_a_tensor(tmp_path):
    path = archive(tmp_path / "a.pt", tensor(4, (2, 2), (2, 1)), [struct.pack("<4f", 1, 2, 3, 4)])
    assert_same(read_tensors(path), {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})


DEEP = b"}X\1\0\0\0a" * (MAX_DEPTH + 2) + b"N" + b"s" * (MAX_DEPTH + 2)
DEEP_KEY = b"}" + b")" + b"\x85" * 100_000 + b"N" + b"s"


@pytest.mark.parametrize(
    ("pickled", "storages", "says"),
    [
        (tensor(4, (1 << 40,), (0,)), [bytes(16)], r"shape \(1099511627776,\) is larger"),
        (tensor(4, (2, 2), (4, 1)), [bytes(16)], "neither an archive"),
        (tensor(4, (4,), (1,), offset=2), [bytes(16)], "neither an archive"),
        (tensor(4, (-4,), (1,)), [bytes(16)], r"has the shape \[-4\], and must have at most 64"),
        (tensor(4, (1,) * 65, (1,) * 65), [bytes(16)], r"the shape \[1, 1, 1, 1, …\]"),
        (tensor(1 << 40, (4,), (1,)), [bytes(16)], "data/0 has 16 bytes, not 1099511627776"),
        (tensor(4, (4,), (1,)), [], "neither an archive"),
        (tensor(4, (4,), (1,), key=b"../b"), [bytes(16)], "neither an archive"),
        (tensor(4, (4,), (1,), type_name=b"Tensor"), [bytes(16)], "it names torch.Tensor"),
        (b"\x80\x02" + DEEP + b".", [], "more than 64 deep"),
        (b"\x80\x02" + DEEP_KEY + b".", [], "neither text nor numbers"),
        (b"\x80\x02(lr\xff\xff\xff\x7f.", [], "neither an archive"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".", [], "neither an archive"),
        (tensor(4, (4,), (1,))[:-2] + b"(dbs.", [bytes(16)], "neither an archive"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", [], None),
        (b"\x80\x02.", [], "neither an archive"),
        (b"", [], "neither an archive"),
        (b"N" * 17 * 1024 * 1024, [], "data.pkl has 17825792 bytes, more than 16777216"),
    ],
)
def test_a_pickle_that_lies_is_refused(tmp_path, pickled, storages, says):
    path = archive(tmp_path / "a.pt", pickled, storages)
    if says is None:
        assert read_tensors(path) == {}
        return
    with pytest.raises(ArtefactError, match=rf"a\.pt cannot be read as weights: .*{says}"):
        read_tensors(path)


@pytest.mark.slow
def test_mappings_that_would_be_visited_a_billion_times_are_refused_soon(tmp_path):
    shared: dict[str, object] = {}
    for _ in range(40):
        shared = {"a": shared, "b": shared}
    torch.save(shared, tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match=r"a\.pt cannot .*: it has more than 200,000 entries"):
        read_tensors(tmp_path / "a.pt")
    torch.save({"k" * 2000: 1}, tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match="one whose name has more than 1,000 characters"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "shape", [(2**63,), (0, 2**70), (-1, 4), (1,) * 65, (2.0,), (1 << 100_000,) * 50]
)
def test_a_shape_that_torch_cannot_have_is_refused_before_its_sizes_are_multiplied(shape):
    with pytest.raises(ForeignFileError, match="must have at most 64 dimensions") as caught:
        num_values_of(shape)
    assert len(str(caught.value)) < 300


def test_the_state_of_a_tensor_is_not_set(tmp_path):
    pickled = tensor(4, (4,), (1,))[:-2] + b"}bs."
    path = archive(tmp_path / "a.pt", pickled, [bytes(16)])
    with pytest.raises(ArtefactError, match="it sets the state of a Tensor"):
        read_tensors(path)


def test_tensors_that_share_a_storage_thousands_of_times_are_refused(tmp_path):
    tensors = torch.zeros(1000)
    torch.save({str(number): tensors for number in range(1000)}, tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match=r"a\.pt: 4000000 bytes of tensors share the storages"):
        read_tensors(tmp_path / "a.pt")


def test_a_weight_may_be_that_of_many_layers(tmp_path):
    shared = torch.arange(100_000.0)
    torch.save({f"layer.{number}": shared for number in range(64)}, tmp_path / "a.pt")
    tensors = read_tensors(tmp_path / "a.pt")
    assert len(tensors) == 64
    assert all(torch.equal(each, shared) for each in tensors.values())


def test_overlapping_parts_of_a_storage_are_each_counted(tmp_path):
    storage = torch.zeros(100_000)
    parts = {str(number): storage[number:] for number in range(64)}
    torch.save(parts, tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match="bytes of tensors share the storages"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_where_it_is_used(tmp_path, value):
    torch.save({"fine": torch.ones(2), "b.bad": torch.tensor([0.0, value])}, tmp_path / "a.pt")
    tensors = read_tensors(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the weight b\.bad has values that are not finite"):
        to_float32(tensors)
    del tensors["b.bad"]
    assert torch.equal(to_float32(tensors)["fine"], torch.ones(2))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64]
)
def test_a_weight_of_a_type_that_is_not_computed_in_is_named(tmp_path, dtype):
    weights = {"fine": torch.ones(2), "b.bad": torch.ones(2).to(dtype)}
    safetensors.torch.save_file(weights, tmp_path / "a.safetensors")
    says = rf"a\.safetensors: the weight b\.bad has the type {dtype}, and must have float16"
    with pytest.raises(ForeignFileError, match=says):
        read_tensors(tmp_path / "a.safetensors")


def test_archives_that_are_compressed_doubled_or_of_another_order_are_refused(tmp_path):
    """A compressed member of 20 MB can take 20 GB."""
    good = tensor(4, (4,), (1,))
    for says, members in [
        ("data.pkl is compressed", {"compress": zipfile.ZIP_DEFLATED}),
        ("byte order b'big'", {"byteorder": "big"}),
    ]:
        path = archive(tmp_path / "a.pt", good, [bytes(16)], **members)
        with pytest.raises(ArtefactError, match=says):
            read_tensors(path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("b/data.pkl", good)
    with pytest.raises(ArtefactError, match="has 2 members named data.pkl, not one"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"none of these", b"PK\x03\x04" + bytes(100), bytes(300)])
def test_a_file_of_something_else_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"a\{suffix} cannot be read as weights: "):
        read_tensors(path)


def test_a_damaged_archive_is_refused(tmp_path):
    torch.save(state(), tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    at = content.index(torch.arange(12.0).numpy().tobytes())
    content[at] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ArtefactError, match="it is damaged: Bad CRC-32"):
        read_tensors(tmp_path / "a.pt")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match="it is not a regular file"):
        read_tensors(tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match=r"b\.pt cannot be read: No such file"):
        read_tensors(tmp_path / "b.pt")
