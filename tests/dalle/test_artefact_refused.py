"""Damaged, incomplete and foreign artefacts are refused, naming the file."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save

from dalle import artefact as artefacts
from dalle.errors import ArtefactError
from dalle.types import COMPONENTS
from tests.dalle.artefact_files import FILES, read, replace_file, rewrite
from tests.permissions import common_user, directory_for_all


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(name, artefact_copy):
    content = bytearray((artefact_copy / name).read_bytes())
    content[-2] ^= 1
    (artefact_copy / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=f"{name} does not match its sha256 in manifest.json"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name, artefact_copy):
    (artefact_copy / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name} is missing, but manifest.json lists it"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_component_that_the_manifest_lists_is_named(component, artefact_copy):
    shutil.rmtree(artefact_copy / component)
    with pytest.raises(ArtefactError, match=f"{component}/.* is missing, but manifest.json lists"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize("name", ["dvae/extra.bin", "clip/deep/down/code.py"])
def test_an_unlisted_file_is_named(name, artefact_copy):
    (artefact_copy / name).parent.mkdir(parents=True, exist_ok=True)
    (artefact_copy / name).write_bytes(b"?")
    with pytest.raises(ArtefactError, match=f"{name} is not in manifest.json"):
        artefacts.load(artefact_copy)


def test_a_component_that_is_not_in_the_manifest_is_not_loaded(artefact_copy):
    manifest = read(artefact_copy)
    files = {name: digest for name, digest in manifest["files"].items() if "clip" not in name}
    rewrite(artefact_copy, files=files)
    with pytest.raises(ArtefactError, match=r"clip/config.json is not in manifest.json"):
        artefacts.load(artefact_copy)


def test_a_symlink_is_refused_though_it_leads_to_the_right_file(artefact_copy, tmp_path):
    name = "dvae/weights.safetensors"
    (artefact_copy / name).rename(tmp_path / "elsewhere")
    (artefact_copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match=f"{name} is missing"):
        artefacts.load(artefact_copy)
    (artefact_copy / name).unlink()
    (tmp_path / "elsewhere").rename(artefact_copy / name)
    (artefact_copy / "dvae" / "more").symlink_to(tmp_path)
    with pytest.raises(ArtefactError, match=r"dvae/more is not in manifest.json"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "format_version must be 1, got None"),
        (b"{}", "format_version must be 1, got None"),
        (b'{"format_version": 2}', "format_version must be 1, got 2"),
        (b'{"format_version": "1"}', "format_version must be 1, got '1'"),
        (b'{"format_version": 1, "files": []}', "is not a manifest: .*files"),
        (b'{"format_version": 1, "colour": 3}', "is not a manifest: .*colour"),
        (b'{"format_version": 1, "stages": [{"stage": "x"}]}', "is not a manifest: .*stage"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(content, says, artefact_copy):
    (artefact_copy / "manifest.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=f"(?s)manifest.json:? {says}"):
        artefacts.load(artefact_copy)


def test_a_directory_without_a_manifest_is_no_artefact(artefact_copy, tmp_path):
    for path in (tmp_path / "empty", tmp_path / "nowhere", artefact_copy / "dvae" / "config.json"):
        if path.name == "empty":
            path.mkdir()
        with pytest.raises(ArtefactError, match=f"{path} is not an artefact: manifest.json is"):
            artefacts.load(path)


def spoil(directory: Path, name: str, **fields: object) -> None:
    content = json.loads((directory / name).read_text()) | fields
    replace_file(directory, name, json.dumps(content).encode())


@pytest.mark.parametrize(
    ("component", "spoilt"),
    [
        ("dvae", {"width": "wide"}),
        ("dvae", {"width": 33}),
        ("dvae", {"patch_size": 0}),
        ("dvae", {"image_size": 17}),
        ("dvae", {"quantiser": "fsq"}),
        ("transformer", {"num_layers": 3}),
        ("transformer", {"num_heads": 0}),
        ("transformer", {"attention_kinds": ["half"]}),
        ("transformer", {"grid_size": -1}),
        ("clip", {"embed_size": None}),
        ("clip", {"vision_layers": [1, 1]}),
        ("clip", {"text_heads": 0}),
        ("clip", {"text_heads": 5}),
        ("clip", {"patch_size": 5}),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_named(component, spoilt, artefact_copy):
    spoil(artefact_copy, f"{component}/config.json", **spoilt)
    with pytest.raises(ArtefactError, match=f"{component} cannot be loaded as {component}"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize("content", [b"", b"[1", b"null", b"\xff" * 100, b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named_though_its_hash_is_right(name, content, artefact_copy):
    replace_file(artefact_copy, name, content)
    with pytest.raises(ArtefactError, match=name.split("/")[0]):
        artefacts.load(artefact_copy)


def test_weights_that_lack_a_tensor_are_named(artefact_copy, tiny_models):
    state = tiny_models.transformer.state_dict()
    del state["text_position"]
    replace_file(artefact_copy, "transformer/weights.safetensors", save(state))
    with pytest.raises(ArtefactError, match=r"(?s)loaded as transformer.*text_position"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize("name", ["manifest.json", "clip/weights.safetensors", "clip"])
def test_an_unreadable_file_is_named(name, tiny_artefact):
    with directory_for_all() as folder:
        shutil.copytree(tiny_artefact, folder / "model")
        (folder / "model").chmod(0o755)
        (folder / "model" / name).chmod(0)
        with common_user(), pytest.raises(ArtefactError, match=f"{name}.* cannot be read: Perm"):
            artefacts.load(folder / "model")
