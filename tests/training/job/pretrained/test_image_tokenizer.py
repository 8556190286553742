"""training.job.pretrained.image_tokenizer: published files give the codes and pixels of the code
that published them (`published/make.py` made the fixtures by it)."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
import yaml

from dalle.errors import ForeignFileError
from tests.training.job.pretrained.published.files import (
    NAMES,
    content_of,
    expected,
    put,
    save,
    weights_of,
    yaml_of,
)
from training.job.pretrained.image_tokenizer import load_image_tokenizer

EACH = pytest.mark.parametrize("name", NAMES)


@EACH
def test_codes_are_those_of_the_original_and_pixels_within_a_hundred_thousandth(name, tmp_path):
    wanted = expected(name)
    tokenizer = load_image_tokenizer(put(name, tmp_path), wanted.images.shape[-1])
    assert not tokenizer.training
    assert torch.equal(tokenizer.encode(wanted.images)[..., 0], wanted.tokens)
    pixels = tokenizer.decode(wanted.codes.unsqueeze(-1))
    torch.testing.assert_close(pixels, wanted.pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("vae", "dalle_pytorch", (32, 8, 24)),
        ("openai", "openai", (256, 32, 24)),
        ("vqgan", "vqgan", (64, 16, 24)),
        ("gumbel", "vqgan", (32, 8, 24)),
        ("vq_8", "vqgan", (256, 32, 24)),
        ("vq_16", "vqgan", (256, 16, 24)),
    ],
)
def test_the_image_size_is_that_of_its_training_unless_the_job_sets_one(
    name, kind, sizes, tmp_path
):
    config = load_image_tokenizer(put(name, tmp_path), None).config
    assert config.kind == kind
    assert (config.image_size, config.grid_size, config.codebook_size) == sizes
    if name != "vae":
        assert load_image_tokenizer(tmp_path, 128).config.image_size == 128


def test_files_of_torch_before_1_6_and_other_files_beside_them_change_nothing(tmp_path):
    put("vae", tmp_path)
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / ".hidden.pt").write_bytes(b"?")
    new = load_image_tokenizer(tmp_path, None)
    torch.save(content_of("vae"), tmp_path / "vae.pt", _use_new_zipfile_serialization=False)
    old = load_image_tokenizer(tmp_path, None)
    assert all(
        torch.equal(old.state_dict()[name], new.state_dict()[name]) for name in old.state_dict()
    )


def test_half_precision_is_computed_in_single(tmp_path):
    content = content_of("vae")
    content["weights"] = {name: value.half() for name, value in content["weights"].items()}
    torch.save(content, tmp_path / "vae.pt")
    tokenizer = load_image_tokenizer(tmp_path, None)
    assert {value.dtype for value in tokenizer.state_dict().values()} == {torch.float32}


def test_llamagens_running_average_goes_before_its_last_weights(tmp_path):
    weights = weights_of("vq_8")
    last = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": last, "ema": weights}, tmp_path / "vq.pt")
    loaded = load_image_tokenizer(tmp_path, None)
    wanted = weights["quantize.embedding.weight"]
    assert torch.equal(loaded.state_dict()["quantize.embedding.weight"], wanted)


def refused(folder, says, image_size=None):
    with pytest.raises(ForeignFileError, match=says):
        load_image_tokenizer(folder, image_size)


def test_a_folder_without_a_tokenizer_or_with_two_is_refused_by_name(tmp_path):
    (tmp_path / "README.md").write_text("none")
    refused(tmp_path, r"must hold the files of one image tokenizer: .* it has only README")
    put("vae", tmp_path)
    put("vq_8", tmp_path)
    refused(tmp_path, r"it has vae\.pt, vq_8\.pt")
    (tmp_path / "vae.pt").unlink()
    put("openai", tmp_path)
    refused(tmp_path, r"it has decoder\.pkl, encoder\.pkl, vq_8\.pt")
    (tmp_path / "vq_8.pt").unlink()
    (tmp_path / "encoder.pkl").unlink()
    refused(tmp_path, r"decoder\.pkl: it is none of the image tokenizers that are known")
    refused(tmp_path / "absent", "absent cannot be read: No such file")


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("vae", 64, r"vae\.pt: .* the size that it was trained on, 32, got image_size=64"),
        ("openai", 100, r"encoder\.pkl: image_size must be a multiple of 8, .* got 100"),
        ("vqgan", 30, r"last\.ckpt and model\.yaml: image_size must be a multiple of 4"),
        ("vq_16", 200, r"vq_16\.pt: image_size must be a multiple of 16, .* got 200"),
    ],
)
def test_an_image_size_that_does_not_divide_is_refused(name, size, says, tmp_path):
    refused(put(name, tmp_path), says, size)


def vae(change):
    content = content_of("vae")
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (vae(lambda file: file["hparams"].pop("num_layers")), "hparams.num_layers must be a whole"),
        (vae(lambda file: file["hparams"].update(num_tokens=2.5)), "num_tokens must be .* got 2.5"),
        (
            vae(lambda file: file["hparams"].update(num_tokens=25)),
            r"\[24, 12\], .*\[25, 12\]",
        ),
        (vae(lambda file: file["hparams"].update(hidden_dim=1 << 40)), "width must be from 1 to"),
        (vae(lambda file: file["hparams"].update(channels=1)), "channels must be 3, .* got 1"),
        (
            vae(lambda file: file["hparams"].update(num_layers=3)),
            "it (lacks|has an)",
        ),
        (vae(lambda file: file["weights"].pop("codebook.weight")), "none of the image tokenizers"),
        (
            vae(lambda file: file["weights"].pop("encoder.0.0.bias")),
            "it lacks weight",
        ),
        (vae(lambda file: file["weights"].update(x=torch.ones(1))), "has an unknown weight x"),
        ({"state_dict": weights_of("vqgan")}, r"needs its \.yaml, which tells its sizes"),
        (
            {"model": {"encoder.conv_blocks.0.res.0.conv1.weight": torch.ones(1)}},
            "there is no weight",
        ),
        ([torch.ones(2)], "none of the image tokenizers that are known"),
    ],
)
def test_weights_and_sizes_that_do_not_belong_together_are_refused(content, says, tmp_path):
    torch.save(content, tmp_path / "vae.pt")
    refused(tmp_path, rf"vae\.pt: .*{says}")


@pytest.mark.parametrize("shape", [(), (0, 3, 3, 3)])
@pytest.mark.parametrize(
    "name",
    [
        "encoder.conv_in.weight",
        "encoder.conv_blocks.0.res.0.conv1.weight",
        "encoder.conv_out.weight",
        "quantize.embedding.weight",
    ],
)
def test_a_weight_of_llamagens_that_tells_no_size_is_refused_by_name(name, shape, tmp_path):
    torch.save({"model": weights_of("vq_8") | {name: torch.ones(shape)}}, tmp_path / "vq.pt")
    refused(
        tmp_path, rf"vq\.pt: the weight .* must have . dimensions, .*{re.escape(f'{[*shape]}')}"
    )


@pytest.mark.parametrize("shape", [(), (0, 3, 7, 7)])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_weight_of_openais_that_tells_no_size_is_refused_by_name(half, shape, tmp_path):
    weights = {"blocks.output.conv.w": torch.ones(24, 8, 1, 1), "blocks.input.w": torch.ones(shape)}
    for each in ("encoder", "decoder"):
        state = weights if each == half else weights | {"blocks.input.w": torch.ones(8, 3, 7, 7)}
        torch.save(state, tmp_path / f"{each}.pkl")
    refused(tmp_path, rf"encoder\.pkl: the weight {half}\.blocks\.input\.weight must have 4 dim")


@pytest.mark.parametrize("name", ["vae", "vq_8", "vqgan"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(name, value, tmp_path):
    put(name, tmp_path)
    (path,) = (each for each in tmp_path.iterdir() if each.suffix in {".pt", ".ckpt"})
    content = content_of(name)
    weights = next(part for part in content.values() if isinstance(part, dict) and len(part) > 9)
    first = next(iter(weights))
    weights[first] = torch.full_like(weights[first], value)
    save(content, path)
    refused(tmp_path, rf"{path.name}: the weight .* has values that are not finite")
    weights[first] = torch.zeros_like(weights[first])
    save(content | {"optimizer_states": [torch.tensor([value])]}, path)
    load_image_tokenizer(tmp_path, None)


@pytest.mark.parametrize("name", ["vae", "vq_8"])
def test_a_weight_beyond_float32_is_refused_by_name(name, tmp_path):
    content = content_of(name)
    weights = content["weights" if name == "vae" else "model"]
    last = next(reversed(weights))
    weights[last] = torch.full(weights[last].shape, 1e300, dtype=torch.float64)
    torch.save(content, tmp_path / f"{name}.pt")
    refused(tmp_path, rf"^{name}\.pt: the weight \S+ has values that float32 cannot hold$")


def change(content, path, value):
    """Set a value of nested dictionaries; None removes it."""
    *parents, last = path.split(".")
    for parent in parents:
        content = content[parent]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model", None, "model must be a mapping"),
        ("model.params.ddconfig", 3, "model.params.ddconfig must be a mapping"),
        ("model.target", "taming.models.cond_transformer.Net2NetTransformer", "must be VQModel or"),
        ("model.params.remap", "used.npy", "remap, a codebook in another order, is not supported"),
        ("model.params.n_embed", 25, r"shape \[24, 8\], and its sizes need \[25, 8\]"),
        ("model.params.n_embed", None, "model.params.n_embed must be a whole number, got None"),
        ("model.params.ddconfig.ch", True, "ddconfig.ch must be a whole number, got True"),
        ("model.params.ddconfig.ch", 20, "must be divisible by num_groups"),
        ("model.params.ddconfig.double_z", None, "double_z must be False, got None"),
        ("model.params.ddconfig.out_ch", 1, "out_ch must be 3, got 1"),
        ("model.params.ddconfig.ch_mult", 2, "ch_mult must be a list of whole numbers, got 2"),
        ("model.params.ddconfig.ch_mult", [1] * 17, "ch_mult must be a list of whole numbers"),
        ("model.params.ddconfig.ch_mult", [1, 2], "it (lacks|has an)"),
        ("model.params.ddconfig.attn_resolutions", [32], "it (lacks|has an)"),
        ("model.params.ddconfig.attn_type", "linear", "attn_type=linear is not supported"),
        (
            "model.params.ddconfig.resamp_with_conv",
            False,
            "resamp_with_conv=False is not",
        ),
    ],
)
def test_a_yaml_of_another_model_is_refused_by_its_key(path, value, says, tmp_path):
    content = yaml_of("vqgan")
    change(content, path, value)
    put("vqgan", tmp_path)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content))
    refused(tmp_path, rf"last\.ckpt and model\.yaml: .*{says}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"!!python/object/apply:os.system ['touch owned']", "could not determine a constructor"),
        (b"model: [", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"- " * 3_000, "cannot be read as YAML"),
        (b" " * (1 << 16) + b"a", "has more than 65,536 bytes"),
        (b"", "model must be a mapping"),
        (b"!!bool x", "cannot be read as YAML: KeyError: 'x'"),
        (b"!!timestamp x", "cannot be read as YAML: AttributeError"),
        (b"!!float " + b"9:" * 400 + b"9.0", "cannot be read as YAML: OverflowError"),
        (b"!!int ''", "cannot be read as YAML: IndexError"),
        (b"a: 2020-13-40", "cannot be read as YAML: ValueError: month must be in 1"),
    ],
)
def test_a_yaml_that_is_none_or_makes_objects_is_refused(content, says, tmp_path):
    put("vqgan", tmp_path)
    (tmp_path / "model.yaml").write_bytes(content)
    refused(tmp_path, rf"model\.yaml.*{says}")


@pytest.mark.parametrize("use", ["[*a0, *a0]", "{<<: [*a0, *a0]}", "*a0"])
def test_a_yaml_that_repeats_a_part_by_an_alias_is_refused_before_it_grows(use, tmp_path):
    """Where each of twenty lines repeats the line before twice, it would take gigabytes."""
    put("vqgan", tmp_path)
    path = tmp_path / "model.yaml"
    path.write_text(f"a: &a0 {{x: 1}}\nb: {use}\n{json.dumps(yaml_of('vqgan'))[1:-1]}\n")
    refused(tmp_path, r"^model\.yaml cannot be read as YAML: it repeats a part by an alias$")


@pytest.mark.parametrize(
    "path", ["target", "params.n_embed", "params.ddconfig.ch_mult", "params.ddconfig.double_z"]
)
def test_a_nested_value_is_not_written_out_to_be_refused(path, tmp_path):
    content = yaml_of("vqgan")
    nested: list[object] = [1]
    for _ in range(40):
        nested = [nested, 2]
    change(content, f"model.{path}", {"deep": nested})
    put("vqgan", tmp_path)
    (tmp_path / "model.yaml").write_text(json.dumps(content))
    refused(tmp_path, rf"model\.{path} must be .*, got {{'deep': \[\.\.\.\]}}$")


class Calls:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ["encoder.pkl", "last.ckpt", "vae.pt"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(name, is_zip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put({"encoder.pkl": "openai", "last.ckpt": "vqgan", "vae.pt": "vae"}[name], tmp_path)
    torch.save({"x": Calls()}, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    refused(tmp_path, rf"{name} cannot be read as weights: it names (posix|os)\.system")
    (tmp_path / name).write_bytes(pickle.dumps(Calls(), 2))
    refused(tmp_path, rf"{name} cannot be read as weights: it names (posix|os)\.system")
    assert not (tmp_path / "owned").exists()


@EACH
def test_a_file_that_ends_early_is_refused(name, tmp_path):
    put(name, tmp_path)
    path = max(tmp_path.iterdir(), key=lambda each: each.stat().st_size)
    content = path.read_bytes()
    for length in (len(content) * 2 // 3, 100):
        path.write_bytes(content[:length])
        refused(tmp_path, f"{path.name} cannot be read as weights: ")


def test_an_old_file_that_ends_early_or_declares_more_than_it_has_is_refused(tmp_path):
    path = tmp_path / "vae.pt"
    torch.save(content_of("vae"), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    refused(tmp_path, r"vae\.pt cannot be read as weights: its storages have more bytes")
    path.write_bytes(content[:-5])
    refused(tmp_path, r"vae\.pt cannot be read as weights: it is damaged: it ends in the storage")


def test_openais_halves_must_be_of_one_model(tmp_path):
    put("openai", tmp_path)
    shutil.copy(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")
    refused(tmp_path, r"decoder\.pkl and encoder\.pkl: ")
