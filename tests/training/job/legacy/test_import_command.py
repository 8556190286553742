"""`python -m training.legacy`: what it says of a file, what it writes, what it refuses."""

import json
import os

import pytest
import torch

from dalle import artefact as artefacts
from dalle.models.legacy.transformer import LegacyTransformer
from dalle.models.tokenizers.dalle_pytorch import DallePytorchVAE
from tests.training.job.legacy.imported import WORDS, write_tokenizer
from tests.training.job.legacy.published.files import HERE, old
from tests.training.job.pretrained.published.files import put
from training import legacy

ORIGINAL = HERE / "1.6.6-plain.pt"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def write(content, folder):
    path = folder / "dalle.pt"
    torch.save(content, path)
    return path


def inspected(path, capsys, *options):
    assert legacy.main(["inspect", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(path, tmp_path, capsys, *options):
    """What `import` says of a file that it refuses. Nothing may be written."""
    out = tmp_path / "artefact"
    assert legacy.main(["import", str(path), "--out", str(out), *options]) == 2
    assert not out.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["0.7.1-four", "1.6.6-plain"])
def test_a_file_of_the_package_becomes_an_artefact_with_all_that_serving_needs(
    name, tmp_path, tokenizer
):
    out = tmp_path / "artefact"
    path = HERE / f"{name}.pt"
    arguments = ["import", str(path), "--tokenizer", str(tokenizer), "--out", str(out)]
    assert legacy.main([*arguments, "--licence", "mit"]) == 0
    artefact = artefacts.load(out)
    assert artefact.components() == ["dvae", "transformer", "tokenizer"]
    assert artefact.manifest.licence == "mit"
    model, expected = artefact.require("transformer"), old(name)
    assert isinstance(model, LegacyTransformer)
    with torch.inference_mode():
        _, hidden = model._hidden(expected.text, expected.image[:, :-1, None])
        logits = model.code_logits(hidden, 0, hidden)
    assert (logits - expected.image_logits).abs().max() < 1e-5
    image = artefact.require("dvae").decode(expected.image[:, :, None])
    assert image.shape == (2, 3, 32, 32)
    text_tokens = artefact.require("tokenizer").encode(["w3 w7"])
    assert text_tokens.tolist() == [[3, 7, *[0] * 14]]


def test_a_file_of_the_package_is_described(capsys):
    found = inspected(ORIGINAL, capsys)
    assert found["kind"] == "checkpoint of train_dalle.py"
    assert found["versions"] == "1.6.6"
    assert found["attention"] == ["full", "axial_row", "axial_col", "conv_like"]
    assert found["sizes"] == {
        "width": 32,
        "layers": 4,
        "heads": 2,
        "head_width": 16,
        "text_vocabulary": 30,
        "text_length": 16,
        "grid_size": 8,
        "image_codes": 24,
    }
    assert found["vae"] == "DALLE-pytorch's own, in the file"
    assert [each for each in found["missing"] if "tokenizer.json" in each] == found["missing"]
    assert found["refused"] is None


def test_the_description_is_text_for_people(capsys):
    assert legacy.main(["inspect", str(ORIGINAL)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kind              checkpoint of train_dalle.py" in lines
    assert "attention         full, axial_row, axial_col, conv_like" in lines


def test_behaviours_are_found_in_the_weights(tmp_path, capsys):
    content = old("1.6.6-reversible").file()
    for name in ("shift_tokens", "rotary_emb", "sandwich_norm", "reversible"):
        del content["hparams"][name]
    found = inspected(write(content, tmp_path), capsys)
    expected = ["reversible", "token shift", "rotary positions", "sandwich norm", "stable"]
    assert found["behaviours"] == [*expected, "a padding id for each position"]


def test_versions_are_narrowed_by_what_a_file_has(tmp_path, capsys):
    for name, versions in (
        ("0.5.1-scale-norm", "0.5.0 to 0.5.1"),
        ("0.8.3-four", "0.8.0 to 0.8.3"),
        ("0.12.1-plain", "0.12.1 to 0.12.5"),
    ):
        assert inspected(write(old(name).file(), tmp_path), capsys)["versions"] == versions


def test_a_bare_file_asks_for_the_attention_of_its_layers(tmp_path, tokenizer, capsys):
    path = write(old("0.1.19-full").file(), tmp_path)
    said = refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer), "--heads", "2")
    assert "--attn-types" in said
    found = inspected(path, capsys, "--heads", "2")
    assert found["attention"] is None
    assert any("--attn-types" in each for each in found["missing"])


@pytest.mark.parametrize(
    ("kind", "version"), [("conv_like", "0.3.4"), ("axial_row", "0.1.26"), ("axial_col", "0.2.6")]
)
def test_attention_that_sees_later_tokens_is_refused(kind, version, tmp_path, tokenizer, capsys):
    content = old("0.7.1-four").file()["weights"]
    path = write(content, tmp_path)
    options = ["--tokenizer", str(tokenizer), "--heads", "2", "--attn-types", kind]
    assert "--dalle-pytorch-version" in refusal(path, tmp_path, capsys, *options)
    said = refusal(path, tmp_path, capsys, *options, "--dalle-pytorch-version", version)
    assert "sees tokens that come after" in said
    found = inspected(
        path, capsys, "--heads", "2", "--attn-types", kind, "--dalle-pytorch-version", version
    )
    assert "sees tokens that come after" in found["refused"]


def test_positions_of_pixels_show_that_axial_attention_is_too_early(tmp_path, tokenizer, capsys):
    path = write(old("0.1.19-full").file(), tmp_path)
    options = ["--tokenizer", str(tokenizer), "--heads", "2", "--attn-types", "axial_row"]
    assert "sees tokens that come after" in refusal(path, tmp_path, capsys, *options)


def test_a_gmlp_is_refused_by_its_name(tmp_path, tokenizer, capsys):
    content = old("0.12.1-plain").file()
    name = "transformer.layers.layers.0.0.fn.fn"
    weights = {
        each: value for each, value in content["weights"].items() if not each.startswith(name)
    }
    content["weights"] = weights | {f"{name}.sgu.weight": torch.ones(1, 96, 96)}
    path = write(content, tmp_path)
    assert "gMLP" in refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer))
    assert "gMLP" in inspected(path, capsys)["refused"]


def test_a_tokenizer_of_another_size_or_none_is_refused(tmp_path, capsys):
    assert "tokenizer.json" in refusal(ORIGINAL, tmp_path, capsys)
    other = write_tokenizer(tmp_path / "other.json", WORDS[:-1])
    said = refusal(ORIGINAL, tmp_path, capsys, "--tokenizer", str(other))
    assert "has 29 entries, and the model needs" in said
    assert "49,408 entries" in refusal(ORIGINAL, tmp_path, capsys, "--tokenizer", "clip")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"version": "1.0"}')
    assert "wrong.json is not a tokenizer.json" in refusal(
        ORIGINAL, tmp_path, capsys, "--tokenizer", str(wrong)
    )


class Runs:
    """What a pickle may ask for: a command that makes a file."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_a_pickle_that_runs_a_command_is_refused(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(old("1.6.6-plain").file() | {"vae_params": Runs()}, tmp_path)
    said = refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer))
    assert "system, which is neither a tensor nor a plain value" in said
    assert legacy.main(["inspect", str(path)]) == 2
    assert not (tmp_path / "was_run").exists()


def test_a_file_that_is_cut_or_no_model_at_all_is_refused(tmp_path, capsys):
    cut = tmp_path / "cut.pt"
    cut.write_bytes(ORIGINAL.read_bytes()[:100_000])
    assert "cut.pt" in refusal(cut, tmp_path, capsys)
    assert "it holds no DALLE" in refusal(
        write({"model": torch.ones(1)}, tmp_path), tmp_path, capsys
    )
    assert "missing.pt" in refusal(tmp_path / "missing.pt", tmp_path, capsys)


@pytest.mark.parametrize("name", ["n" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name, capsys):
    assert legacy.main(["inspect", name]) == 2
    assert f"{name:.80} cannot be read: " in capsys.readouterr().err


def test_weights_of_data_parallel_are_read_without_its_prefix(tmp_path, capsys):
    content = {f"module.{name}": value for name, value in old("0.1.19-full").weights.items()}
    options = ["--heads", "2", "--attn-types", "full"]
    assert inspected(write(content, tmp_path), capsys, *options)["missing"][0].startswith("a tok")


def test_weights_that_are_not_finite_or_empty_or_missing_are_refused_by_name(
    tmp_path, tokenizer, capsys
):
    name = "transformer.layers.layers.0.0.fn.fn.fn.to_qkv.weight"
    for value, words in (
        (torch.full((96, 32), torch.nan), "has values that are not finite"),
        (torch.empty(0), "is empty, which is what ZeRO-3 leaves"),
        (torch.ones(96, 31), "has the shape [96, 31]"),
        (None, "to_qkv.weight"),
    ):
        content = old("1.6.6-plain").file()
        if value is None:
            del content["weights"][name]
        else:
            content["weights"][name] = value
        path = write(content, tmp_path)
        assert words in refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer))


def test_only_weights_that_are_used_must_be_finite(tmp_path, tokenizer, capsys):
    content = old("1.6.6-plain").file()
    content["weights"]["vae.codebook.weight"] = torch.full((24, 6), torch.nan)
    path, folder = write(content, tmp_path), tmp_path / "vae"
    folder.mkdir()
    put("vae", folder)
    options = ["--tokenizer", str(tokenizer)]
    said = refusal(path, tmp_path, capsys, *options)
    assert "the weight vae.codebook.weight has values that are not finite" in said
    assert "vae.codebook.weight has values" in inspected(path, capsys)["missing"][1]
    out = ["--vae", str(folder), "--out", str(tmp_path / "out")]
    assert legacy.main(["import", str(path), *options, *out]) == 0


def test_the_state_of_an_optimiser_may_be_not_finite(tmp_path, tokenizer):
    content = old("1.6.6-plain").file()
    content["opt_state"] = {"state": {0: {"exp_avg": torch.full((2,), torch.nan)}}}
    path, out = write(content, tmp_path), tmp_path / "out"
    arguments = ["import", str(path), "--tokenizer", str(tokenizer), "--out", str(out)]
    assert legacy.main(arguments) == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("transformer.pos_emb", "the weight transformer.pos_emb has the shape []"),
        ("to_logits.1.bias", "the weight to_logits.1.bias has the shape []"),
        ("text_emb.weight", "the weight text_embedding.weight has the shape []"),
        ("vae.encoder.0.0.weight", "the weight encoder.0.0.weight must have 4 dimensions"),
    ],
)
def test_a_weight_without_dimensions_is_refused_by_its_name(
    name, says, tmp_path, tokenizer, capsys
):
    content = old("1.6.6-plain").file()
    content["weights"][name] = torch.tensor(1.0)
    path = write(content, tmp_path)
    assert says in refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer))


def test_a_folder_that_is_named_by_a_dot_is_said_by_its_name(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert legacy.main(["inspect", "."]) == 2
    assert capsys.readouterr().err.startswith("mine has no global_step*")


def test_weights_of_data_parallel_and_a_version_with_a_suffix_are_read(tmp_path, capsys):
    content = old("1.6.6-plain").file()
    content["weights"] = {f"module.{name}": each for name, each in content["weights"].items()}
    content["version"] = "1.6.6.post1"
    found = inspected(write(content, tmp_path), capsys)
    assert (found["versions"], found["refused"]) == ("1.6.6", None)


def test_an_unknown_weight_is_refused_not_left_out(tmp_path, tokenizer, capsys):
    content = old("1.6.6-plain").file()
    content["weights"]["transformer.memory.weight"] = torch.ones(3)
    path = write(content, tmp_path)
    said = refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer))
    assert "transformer.memory.weight is unknown" in said


def test_a_folder_that_has_files_is_not_written_to(tmp_path, tokenizer, capsys):
    (tmp_path / "mine").write_text("keep")
    arguments = ["import", str(ORIGINAL), "--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    assert legacy.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, says in (
        (tmp_path / "file" / "a" / "b", "file, which is no folder"),
        (tmp_path / "link", "link is there already"),
        (tmp_path / "link" / "a", "link, which is no folder"),
        (tmp_path / ("n" * 300), "cannot be written: "),
        ("a\0b", "cannot be written: "),
    ):
        assert legacy.main(["import", "missing.pt", "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("--out ")
        assert says in said
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dalle-pytorch-version", "1.4.2"], ["version 1.6.6", "is 1.4.2"]),
        (["--attn-types", "full"], ["full,axial_row,axial_col,conv_like", "--attn-types is full"]),
        (["--stable"], ["stable=False", "--stable"]),
        (["--heads", "4"], ["2 heads", "--heads is 4"]),
        (["--hidden-padding"], ["a padding id for each position", "--hidden-padding"]),
    ],
)
def test_an_option_that_contradicts_the_file_is_refused_with_both(
    options, words, tmp_path, tokenizer, capsys
):
    content = old("1.6.6-plain").file()
    content["hparams"] = content["hparams"] | {"stable": False}
    path = write(content, tmp_path)
    said = refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer), *options)
    assert all(each in said for each in words), said
    assert inspected(path, capsys, *options)["refused"] in said


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        (
            "0.1.19-full",
            "0.2.8",
            "version 0.2.8 of DALLE-pytorch, and weights of version 0.1.19 to",
        ),
        ("0.8.3-four", "0.9.1", "version 0.9.1 of DALLE-pytorch, and weights of version 0.1.19 to"),
        ("0.9.0-four", "0.8.3", "version 0.8.3 of DALLE-pytorch, and weights of version 0.9.0 to"),
    ],
)
def test_a_version_that_the_weights_contradict_is_refused_with_theirs(
    name, version, words, tmp_path, capsys
):
    path = write(old(name).file(), tmp_path)
    options = ["--heads", "2", "--dalle-pytorch-version", version]
    assert words in inspected(path, capsys, *options)["refused"]


def test_options_that_say_what_the_file_says_are_taken(capsys):
    options = ["--dalle-pytorch-version", "1.6.6", "--heads", "2", "--no-hidden-padding"]
    kinds = ["--attn-types", "full,axial_row,axial_col,conv_like"]
    assert inspected(ORIGINAL, capsys, *options, *kinds)["refused"] is None


@pytest.mark.parametrize("number", ["0", "-2", "two"])
def test_heads_are_a_whole_number_from_1(number, capsys):
    with pytest.raises(SystemExit):
        legacy.main(["inspect", str(ORIGINAL), "--heads", number])
    assert "a whole number from 1" in capsys.readouterr().err


def test_rotary_positions_tell_the_heads(tmp_path, capsys):
    content = old("1.6.6-head-width").file()  # 3 heads of 24 channels
    for name in ("heads", "dim_head"):
        del content["hparams"][name]
    path = write(content, tmp_path)
    sizes = inspected(path, capsys)["sizes"]
    assert (sizes["heads"], sizes["head_width"]) == (3, 24)
    said = inspected(path, capsys, "--heads", "9")["refused"]
    assert "rotary positions are of heads of 24 channels, and --heads 9 makes them 8" in said


def with_wide_heads(name):
    """Bare weights whose attention has 64 channels, which may be one head or several."""
    weights = {}
    for each, value in old(name).weights.items():
        if each.endswith("to_qkv.weight"):
            value = torch.ones(192, 32)
        elif each.endswith("to_out.0.weight"):
            value = torch.ones(32, 64)
        weights[each] = value
    return weights


def test_heads_that_nothing_tells_are_the_default_and_both_commands_say_so(
    tmp_path, tokenizer, capsys
):
    path = write(with_wide_heads("0.8.3-four"), tmp_path)
    options = ["--attn-types", "full", "--dalle-pytorch-version", "0.8.3"]
    found = inspected(path, capsys, *options)
    (note,) = [each for each in found["notes"] if "--heads" in each]
    assert "taken are 1 of 64 channels" in note
    out = ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "artefact")]
    assert legacy.main(["import", str(path), *options, *out]) == 0
    assert [f"note: {each}" for each in found["notes"]] == capsys.readouterr().out.splitlines()[:-1]
    asked = inspected(path, capsys, *options, "--heads", "4")
    assert asked["sizes"]["head_width"] == 16
    assert not any("--heads" in each for each in asked["notes"])


@pytest.mark.parametrize(("name", "version"), [("1.4.2-plain", "1.4.2"), ("1.6.6-plain", "1.6.6")])
def test_the_window_of_conv_like_is_asked_for_where_the_version_is_open(
    name, version, tmp_path, tokenizer, capsys
):
    kinds = old(name).settings["attn_types"]
    path = write(old(name).weights, tmp_path)
    options = ["--attn-types", ",".join(kinds), "--heads", "2"]
    said = refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer), *options)
    assert "conv_like" in said
    assert "--dalle-pytorch-version" in said
    told = inspected(path, capsys, *options, "--dalle-pytorch-version", version)
    assert (told["versions"], told["refused"]) == (version, None)


def test_positions_of_pixels_show_versions_whose_vae_does_not_normalise(
    tmp_path, tokenizer, capsys
):
    path = write(old("0.1.19-full").file(), tmp_path)
    options = ["--attn-types", "full", "--heads", "2"]
    assert inspected(path, capsys, *options)["versions"] == "0.1.19 to 0.1.25"
    out = tmp_path / "artefact"
    more = ["--tokenizer", str(tokenizer), "--out", str(out)]
    assert legacy.main(["import", str(path), *options, *more]) == 0
    vae = artefacts.load(out).require("dvae")
    assert isinstance(vae, DallePytorchVAE)
    assert not vae.config.is_normalised


def test_the_version_is_asked_for_where_it_decides_what_the_vae_does(tmp_path, tokenizer, capsys):
    path = write(old("0.7.1-no-mask").weights, tmp_path)
    options = ["--attn-types", "full", "--heads", "2"]
    said = refusal(path, tmp_path, capsys, "--tokenizer", str(tokenizer), *options)
    assert "normalises images" in said
    assert said.strip().endswith("--dalle-pytorch-version")
    (missing,) = [each for each in inspected(path, capsys, *options)["missing"] if "VAE" in each]
    assert missing in said


def test_behaviours_are_found_where_the_rest_is_not_told(tmp_path, capsys):
    path = write(old("0.8.3-reversible").weights, tmp_path)
    found = inspected(path, capsys, "--heads", "2", "--dalle-pytorch-version", "0.8.3")
    assert found["attention"] is None
    assert found["behaviours"] == ["reversible", "padding hidden from attention"]
    others = {
        "transformer.pos_emb": torch.ones(1, 81, 12)
    }  # not by the package: they count nothing
    path = write(old("1.6.6-reversible").weights | others, tmp_path)
    found = inspected(path, capsys)
    assert "text_seq_len" in found["missing"][0]
    expected = ["reversible", "token shift", "rotary positions", "sandwich norm"]
    assert found["behaviours"] == expected


def test_behaviours_that_are_not_known_are_not_called_nothing(tmp_path, capsys):
    path = write(old("0.1.19-full").file(), tmp_path)
    assert legacy.main(["inspect", str(path)]) == 0
    assert "also              unknown" in capsys.readouterr().out.splitlines()
