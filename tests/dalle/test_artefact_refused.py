"""Damaged, incomplete and foreign artefacts are refused, naming the file."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dalle import artefact as artefacts
from dalle.errors import ArtefactError, DivergenceError
from dalle.types import COMPONENTS, STAGES
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
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"format_version": ' + b"[" * 500 + b"]" * 500 + b"}", "format_version must be 1"),
        (b" " * (17 << 20), "has more than 16,777,216 bytes"),
        (b'{"format_version": NaN}', "is not JSON: NaN"),
        (b'{"format_version": 1, "format_version": 1}', "is not JSON: the key 'format_version' "),
        (b'{"format_version": 1, "files": {"../x/a": ""}}', "is not a manifest: .*'../x/a' is not"),
        (b'{"format_version": 1, "files": {"dvae/../../a": ""}}', "is not a manifest: .*is not a"),
        (b'{"format_version": 1, "files": {"/etc/passwd": ""}}', "is not a manifest: .*is not a"),
        (b'{"format_version": 1, "files": {"dvae/a\\u0000": ""}}', "is not a manifest: .*is not a"),
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
        ("clip", {"patch_size": None}),  # a ResNet's
        ("clip", {"vision_layers": [1, 1, 1, 1]}),
        ("dvae", {"num_downsamples": 10**6}),
        ("dvae", {"image_size": 1 << 40}),
        ("dvae", {"width": 65_536}),
        ("dvae", {"kl_weight": 1e300}),
        ("dvae", {"colour": "red"}),
        ("transformer", {"num_layers": 10**9}),
        ("transformer", {"num_heads": -1}),
        ("transformer", {"width": 65_536}),
        ("transformer", {"text_vocab_size": 1 << 24}),
        ("clip", {"text_layers": 10**9}),
        ("clip", {"vision_layers": [1, 1, 1, 10**9]}),
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


def packed(state: dict[str, torch.Tensor]) -> bytes:
    """The file of some weights, whose layout another test may have changed."""
    return save({name: value.contiguous() for name, value in state.items()})


def test_weights_that_lack_a_tensor_are_named(artefact_copy, tiny_models):
    state = tiny_models.transformer.state_dict()
    del state["text_position"]
    replace_file(artefact_copy, "transformer/weights.safetensors", packed(state))
    with pytest.raises(ArtefactError, match=r"(?s)loaded as transformer.*text_position"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("component", STAGES)
def test_weights_that_are_not_finite_are_named(component, value, artefact_copy, tiny_models):
    state = getattr(tiny_models, component).state_dict()
    name = next(name for name in reversed(state) if state[name].is_floating_point())
    spoilt = state | {name: torch.full_like(state[name], value)}
    replace_file(artefact_copy, f"{component}/weights.safetensors", packed(spoilt))
    with pytest.raises(ArtefactError, match=f"{component}/weights.*: the weight {name} is NaN or"):
        artefacts.load(artefact_copy)


def test_weights_that_are_not_finite_are_not_saved(tiny_artefact, tmp_path):
    artefact = artefacts.load(tiny_artefact)
    artefact.clip.model.logit_scale.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"the weight model\.logit_scale of clip is NaN"):
        artefacts.save(tmp_path / "model", artefact)
    assert not (tmp_path / "model").exists()


def test_weights_of_another_shape_or_type_are_named_before_a_model_is_built(
    artefact_copy, tiny_models
):
    state = tiny_models.transformer.state_dict()
    for spoilt, says in [
        ({"text_position": state["text_position"].double()}, "torch.float64|None"),
        ({"text_position": state["text_position"][:1]}, r"as \[1, .*needs"),
        ({"another": torch.zeros(1)}, "unexpected weight: another"),
    ]:
        replace_file(artefact_copy, "transformer/weights.safetensors", packed(state | spoilt))
        with pytest.raises(ArtefactError, match=f"(?s)loaded as transformer.*{says}"):
            artefacts.load(artefact_copy)


@pytest.mark.parametrize(
    "content", [b'{"width": 32, "width": 32}', b"[" * 100_000, b" " * (2 << 20)]
)
def test_a_config_that_can_be_read_in_two_ways_or_in_none_is_refused(content, artefact_copy):
    replace_file(artefact_copy, "transformer/config.json", content)
    with pytest.raises(ArtefactError, match="transformer cannot be loaded as transformer"):
        artefacts.load(artefact_copy)


def test_a_component_that_is_a_symlink_is_refused(artefact_copy, tmp_path):
    (artefact_copy / "dvae").rename(tmp_path / "elsewhere")
    (artefact_copy / "dvae").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="dvae is a symlink"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(name, artefact_copy):
    (artefact_copy / name).unlink()
    os.mkfifo(artefact_copy / name)
    with pytest.raises(ArtefactError, match=f"{name} is (missing|not a regular file)"):
        artefacts.load(artefact_copy)


@pytest.mark.parametrize("name", ["manifest.json", "clip/weights.safetensors", "clip"])
def test_an_unreadable_file_is_named(name, tiny_artefact):
    with directory_for_all() as folder:
        shutil.copytree(tiny_artefact, folder / "model")
        (folder / "model").chmod(0o755)
        (folder / "model" / name).chmod(0)
        with common_user(), pytest.raises(ArtefactError, match=f"{name}.* cannot be read: Perm"):
            artefacts.load(folder / "model")
