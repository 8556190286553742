"""The forms in which people hold these models: every one is read as the same model."""

import math
import shutil
import sys
from collections import OrderedDict
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from dalle.errors import ForeignFileError
from dalle.models.legacy.transformer import LegacyTransformer
from dalle.models.tokenizers.dalle_pytorch import DallePytorchVAE
from dalle.models.tokenizers.openai import OpenAIDVAE
from dalle.models.tokenizers.vqgan import VQGAN
from dalle.preprocess.openai_clip import openai_tokenizer
from tests.training.job.legacy.imported import import_old, write_tokenizer
from tests.training.job.legacy.published.files import TEXT, VAE, old
from tests.training.job.pretrained.published.files import expected, put, weights_of
from tests.training.job.pretrained.published.seeded_weights import seeded_weights
from training.engine.devices import peak_bytes
from training.job.legacy.config.choices import Choices
from training.job.legacy.config.positions import image_positions
from training.job.legacy.describe import describe
from training.job.legacy.importer import Beside, import_model

NAME = "0.8.3-four"
PLAIN = Choices()


def write(content, folder, name="dalle.pt"):
    path = folder / name
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    return Beside(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the imported model, from the plain file."""
    artefact = import_old(NAME, tmp_path_factory.mktemp("plain"))
    return artefact.require("transformer").state_dict()


def assert_same(path, weights, beside, choices=PLAIN):
    found = import_model(path, choices, beside).require("transformer").state_dict()
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert torch.equal(value, weights[name]), name


# --- save formats


def test_a_file_of_torch_before_1_6_is_read(tmp_path, weights, beside):
    path = tmp_path / "dalle.pt"
    torch.save(old(NAME).file(), path, _use_new_zipfile_serialization=False)
    assert_same(path, weights, beside)


def test_the_optimiser_and_the_scheduler_beside_the_weights_are_left_out(tmp_path, weights, beside):
    # As torch's Adam and ReduceLROnPlateau save themselves.
    of_weight = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "params": [0]}
    states = {
        "opt_state": {"state": {0: of_weight}, "param_groups": [group]},
        "scheduler_state": {"best": float("inf"), "min_lrs": [0], "mode": "min"},
    }
    assert_same(write(old(NAME).file() | states | {"epoch": 7}, tmp_path), weights, beside)


class DiscreteVAE(nn.Module):
    """A class that is pickled whole into the hyperparameters of files of early 2021."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.loss_fn = nn.functional.mse_loss


def test_a_vae_that_is_pickled_whole_among_the_settings_is_left_out(tmp_path, weights, beside):
    package = ModuleType("dalle_pytorch.dalle_pytorch")
    package.DiscreteVAE = DiscreteVAE  # type: ignore[attr-defined]
    modules = {"dalle_pytorch": ModuleType("dalle_pytorch"), package.__name__: package}
    content = old(NAME).file()
    with (
        patch.dict(sys.modules, modules),
        patch.object(DiscreteVAE, "__module__", package.__name__),
    ):
        content["hparams"] = content["hparams"] | {"vae": DiscreteVAE()}
        path = write(content, tmp_path)
    assert_same(path, weights, beside)


def test_half_precision_weights_become_float32(tmp_path, beside):
    content = old(NAME).file()
    content["weights"] = {name: value.half() for name, value in content["weights"].items()}
    del content["weights"]["logits_mask"]
    content["weights"]["logits_mask"] = torch.zeros(1, 80, 54, dtype=torch.bool)
    found = import_model(write(content, tmp_path), PLAIN, beside).require("transformer")
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32}


def test_positions_of_a_later_axial_package_have_other_names(tmp_path, weights, beside):
    content = old(NAME).file()
    for axis in "01":
        value = content["weights"].pop(f"image_pos_emb.weights_{axis}")
        content["weights"][f"image_pos_emb.weights.{axis}"] = value
    assert_same(write(content, tmp_path), weights, beside)


@pytest.mark.parametrize("name", ["1.0.3-rotary", "1.6.6-all", "1.6.6-shared-embedding"])
def test_bare_weights_tell_the_caption_by_its_angles_and_shared_codes_by_the_vae(
    name, tmp_path, beside
):
    model = old(name)
    expected = import_old(name, tmp_path).require("transformer").config
    kinds = tuple(model.settings["attn_types"])
    told = Choices(kinds, model.version, 2, model.settings["stable"])
    found = import_model(write(model.weights, tmp_path, "bare.pt"), told, beside)
    assert found.require("transformer").config == expected


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        ((1, 8, 2, 32), (1, 1, 8, 32), r"must have the shapes \[1, rows, 1, width\]"),
        ((1, 8, 1, 31), (1, 1, 8, 32), r"must have the shapes \[1, rows, 1, width\]"),
        ((1, 8, 1, 31), (1, 1, 8, 31), "a width of 31, and the model of 32"),
        ((), (1, 1, 8, 32), r"must have the shapes \[1, rows, 1, width\]"),
    ],
)
def test_axial_positions_of_another_shape_are_refused(rows, columns, says, tmp_path, beside):
    content = old(NAME).file()
    content["weights"]["image_pos_emb.weights_0"] = torch.zeros(rows)
    content["weights"]["image_pos_emb.weights_1"] = torch.zeros(columns)
    with pytest.raises(ForeignFileError, match=says):
        import_model(write(content, tmp_path), PLAIN, beside)


def test_axial_positions_are_summed_only_where_the_image_has_some():
    """Of sides of 100,000 the sum would have ten billion values."""
    rows, columns = torch.zeros(1, 100_000, 1, 1), torch.zeros(1, 1, 100_000, 1)
    rows[0, 1], columns[0, 0, 2] = 5.0, 7.0
    weights = {"image_pos_emb.weights_0": rows, "image_pos_emb.weights_1": columns}
    found = image_positions(weights, 100_001, 1)
    assert found is not None
    assert found[:, 0].nonzero().flatten().tolist() == [2, 100_000]


def test_axial_positions_of_a_side_beyond_all_models_are_refused_before_they_are_summed(
    tmp_path, beside
):
    content = old(NAME).file()
    del content["weights"]["logits_mask"]
    content["weights"]["image_pos_emb.weights_0"] = torch.zeros(1, 10_000, 1, 32)
    content["weights"]["image_pos_emb.weights_1"] = torch.zeros(1, 1, 10_000, 32)
    with pytest.raises(ForeignFileError, match="grid_size must be from 1 to 128, got 10000"):
        import_model(write(content, tmp_path), PLAIN, beside)


def test_a_grid_that_short_tables_claim_is_refused_before_memory_is_taken(tmp_path, beside):
    """Two tables of 1,024 rows have 256 kB, and their sum has 128 MB."""
    content = old(NAME).file()
    del content["weights"]["logits_mask"]
    for name, shape in ("weights_0", (1, 1024, 1, 32)), ("weights_1", (1, 1, 1024, 32)):
        content["weights"][f"image_pos_emb.{name}"] = torch.zeros(shape)
    path = write(content, tmp_path)

    def refused():
        with pytest.raises(ForeignFileError, match="grid_size must be from 1 to 128, got 1024"):
            import_model(path, PLAIN, beside)

    assert peak_bytes(refused, torch.device("cpu")) < 2 * path.stat().st_size


def test_a_weight_of_truth_values_is_refused_by_its_name(tmp_path, beside):
    content = old(NAME).file()
    content["weights"]["text_emb.weight"] = torch.ones(30, 32, dtype=torch.bool)
    with pytest.raises(ForeignFileError, match=r"text_embedding\.weight has the type torch\.bool"):
        import_model(write(content, tmp_path), PLAIN, beside)


# --- kobiso's release


def kobiso(folder):
    """His file: settings as he names them, and one text for the kinds of attention."""
    model = old("0.7.2-head-width")
    args = TEXT | {"depth": 4, "heads": 3, "reversible": False, "loss_img_weight": 7}
    kinds = {"attn_types": "full,axial_row,axial_col,conv_like"}
    return write({"args": args | kinds, "dalle": model.weights}, folder, "cub200_adam_frcc.pt")


MARKS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<|startoftext|>", "<|endoftext|>"]


def test_kobisos_release_is_told_by_its_names_and_needs_no_deepspeed(tmp_path):
    found = describe(kobiso(tmp_path), PLAIN)
    assert found.kind == "release of kobiso's DALLE-reproduction"
    assert found.versions == "0.7.2"
    assert found.attention == ["full", "axial_row", "axial_col", "conv_like"]
    assert any("DeepSpeed is not needed" in note for note in found.notes)
    assert "at most 30 entries" in found.tokenizer


def test_kobisos_captions_stand_between_his_marks_and_his_file_may_be_shorter(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "cub.json", [*MARKS, "a", "Red", "red", "bird"])
    artefact = import_model(kobiso(tmp_path), PLAIN, Beside(str(tokenizer)))
    assert artefact.require("transformer").config.head_width == 24
    encoded = artefact.require("tokenizer").encode(["a Red bird", "a blue bird"])
    assert encoded[:, :6].tolist() == [[5, 7, 8, 10, 6, 0], [5, 7, 0, 10, 6, 0]]
    without = write_tokenizer(tmp_path / "without.json", ["[UNK]", "a"])
    with pytest.raises(ForeignFileError, match="lacks <|startoftext|>"):
        import_model(kobiso(tmp_path), PLAIN, Beside(str(without)))


# --- tokenizers


def test_a_file_of_train_dalle_adds_no_marks_whatever_the_tokenizer_file_says(tmp_path):
    words = [f"w{number}" for number in range(30)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "t.json"))
    path = write(old(NAME).file(), tmp_path)
    found = import_model(path, PLAIN, Beside(str(tmp_path / "t.json"))).require("tokenizer")
    assert found.encode(["w3 w4 w5"]).tolist() == [[3, 4, 5, *[0] * 13]]


def test_a_tokenizer_with_an_id_beyond_the_models_rows_is_refused(tmp_path):
    ids = {f"w{number}": number for number in range(29)} | {"last": 30}
    Tokenizer(models.WordLevel(ids, "w0")).save(str(tmp_path / "t.json"))
    path = write(old(NAME).file(), tmp_path)
    with pytest.raises(
        ForeignFileError, match=r"t\.json has the id 30, and the model's ids end at"
    ):
        import_model(path, PLAIN, Beside(str(tmp_path / "t.json")))


def with_clip_vocabulary(name):
    """A file whose text has the byte pairs of OpenAI's CLIP."""
    content = old(name).file()
    content["hparams"] = content["hparams"] | {"num_text_tokens": 49408}
    state = content["weights"]
    padding = 16 if len(state["text_emb.weight"]) > 30 else 0
    state["text_emb.weight"] = torch.zeros(49408 + padding, 32)
    state["to_logits.1.weight"] = torch.zeros(49408 + padding + 24, 32)
    state["to_logits.1.bias"] = torch.zeros(49408 + padding + 24)
    state["logits_mask"] = torch.zeros(1, 80, 1, dtype=torch.bool)
    return content


@pytest.mark.parametrize(
    ("name", "version", "end"),
    [
        ("0.7.1-four", None, []),
        ("0.8.3-four", "0.8.0", []),
        ("0.8.3-four", "0.8.1", [49407]),
        ("0.8.3-four", "0.8.3", [49407]),
        ("0.9.0-four", "0.9.0", [49407]),
        ("0.9.0-four", "0.9.1", []),
    ],
)
def test_the_byte_pairs_of_clip_have_their_own_ids_as_in_simple_tokenizer(
    name, version, end, tmp_path
):
    caption = "A Red  bird&amp; its nest!"
    path = write(with_clip_vocabulary(name), tmp_path)
    artefact = import_model(path, Choices(version=version), Beside())
    ids = [*openai_tokenizer().encode(caption), *end]
    tokenizer = artefact.require("tokenizer")
    tokens = tokenizer.encode([caption])
    assert tokens[0, : len(ids) + 1].tolist() == [*ids, 0]
    assert tokenizer.decode(tokens)[0].startswith("a red bird")


def test_the_version_is_asked_for_where_it_decides_the_mark_that_ends_captions(tmp_path):
    path = write(with_clip_vocabulary(NAME), tmp_path)
    assert any("<|endoftext|>" in each for each in describe(path, PLAIN).missing)
    with pytest.raises(ForeignFileError, match="0.8.1 to 0.9.0: .* --dalle-pytorch-version"):
        import_model(path, PLAIN, Beside())


# --- VAEs


def with_vae(weights, codes, **settings):
    """A file whose VAE is a pretrained one, with as many codes as it."""
    content = old(NAME).file()
    content["vae_params"] = None
    state = content["weights"]
    for name in [each for each in state if each.startswith("vae.")]:
        del state[name]
    assert codes == VAE["num_tokens"]
    return content | settings | {"weights": state | weights}


def test_openais_dvae_comes_out_of_the_models_own_file(tmp_path, beside):
    # Names in the file are those of the pickled modules.
    shapes = expected("openai").shapes
    state = {}
    for half, part in (("encoder", "enc"), ("decoder", "dec")):
        for name, value in seeded_weights(shapes[half]).items():
            state[f"vae.{part}.{name}"] = value
    path = write(with_vae(state, 24), tmp_path)
    assert describe(path, PLAIN).vae == "OpenAI's dVAE, in the file"
    vae = import_model(path, PLAIN, beside).require("dvae")
    assert isinstance(vae, OpenAIDVAE)
    assert vae.config.image_size == 64


@pytest.mark.parametrize("name", ["vqgan", "gumbel"])
def test_tamings_vqgan_comes_out_of_the_models_own_file(name, tmp_path, beside):
    state = {f"vae.model.{each}": value for each, value in weights_of(name).items()}
    state["vae.model.loss.perceptual_loss.lin0.model.1.weight"] = torch.full(
        (1, 64, 1, 1), math.nan
    )
    path = write(with_vae(state, 24, vae_class_name="VQGanVAE"), tmp_path)
    assert describe(path, PLAIN).vae == "VQGAN of taming-transformers, in the file"
    vae = import_model(path, PLAIN, beside).require("dvae")
    assert isinstance(vae, VQGAN)
    assert vae.config.image_size == 32
    answer = expected(name)
    assert torch.equal(vae.encode(answer.images)[..., 0], answer.tokens)
    assert (vae.decode(answer.codes[..., None]) - answer.pixels).abs().max() < 1e-5


def test_without_a_vae_in_the_file_its_files_are_asked_for_and_taken(tmp_path, beside):
    path = write(with_vae({}, 24), tmp_path)
    assert any("--vae" in each for each in describe(path, PLAIN).missing)
    with pytest.raises(ForeignFileError, match="--vae"):
        import_model(path, PLAIN, beside)
    folder = tmp_path / "vae"
    folder.mkdir()
    put("vqgan", folder)
    vae = import_model(path, PLAIN, Beside(beside.tokenizer, folder)).require("dvae")
    assert vae.config.image_size == 32  # 8 x 8 codes, whatever its YAML was made for
    single = tmp_path / "single"
    single.mkdir()
    put("vae", single)
    beside_file = Beside(beside.tokenizer, single / "vae.pt")
    assert import_model(path, PLAIN, beside_file).require("dvae").config.image_size == 32


def test_a_yaml_in_place_of_a_vaes_weights_is_refused_with_what_to_name(tmp_path, beside):
    (tmp_path / "v.yaml").write_text("model: {}")
    path = write(with_vae({}, 24), tmp_path)
    with pytest.raises(ForeignFileError, match=r"v\.yaml has no weights: name the file of weights"):
        import_model(path, PLAIN, Beside(beside.tokenizer, tmp_path / "v.yaml"))


def test_a_vae_of_other_sizes_is_refused_with_both(tmp_path, beside):
    content = with_vae({}, 24)
    state = content["weights"]
    state["image_emb.weight"] = state["image_emb.weight"][:20]
    for each in ("weight", "bias"):
        state[f"to_logits.1.{each}"] = state[f"to_logits.1.{each}"][: 30 + 20]
    path = write(content, tmp_path)
    folder = tmp_path / "vae"
    folder.mkdir()
    put("vqgan", folder)
    with pytest.raises(ForeignFileError, match=r"8 x 8 codes of 20, and those of the VAE .* 24"):
        import_model(path, PLAIN, Beside(beside.tokenizer, folder))


def test_a_vae_from_before_normalisation_reads_and_writes_other_values(tmp_path):
    late, early = (
        import_old(name, tmp_path).require("dvae") for name in ("0.8.3-four", "0.1.19-full")
    )
    assert isinstance(late, DallePytorchVAE)
    assert isinstance(early, DallePytorchVAE)
    assert (late.config.is_normalised, early.config.is_normalised) == (True, False)
    codes = old("0.1.19-full").image[:, :, None]
    raw = early.decoder(early.on_grid(early.codebook(codes[..., 0])))
    assert torch.equal(early.decode(codes), raw.clamp(0, 1))


# --- folders of DeepSpeed's


def deepspeed_folder(folder, model, *, tag="global_step3"):
    """A folder without steps' contents: settings, the name of the newest step, an old step."""
    (folder / "global_step1").mkdir(parents=True)
    (folder / tag).mkdir()
    (folder / "latest").write_text(tag)
    auxiliary = old(model).file() | {"weights": "look at the folders, by zero_to_fp32.py"}
    torch.save(auxiliary, folder / "auxiliary.pt")
    return folder / tag


def test_a_folder_of_deepspeeds_is_read_with_its_auxiliary_file(tmp_path, weights, beside):
    step = deepspeed_folder(tmp_path / "dalle-ds-cp", NAME)
    content = {"module": OrderedDict(old(NAME).weights), "dp_world_size": 1, "global_steps": 3}
    torch.save(content, step / "mp_rank_00_model_states.pt")
    assert_same(tmp_path / "dalle-ds-cp", weights, beside)
    found = describe(tmp_path / "dalle-ds-cp", PLAIN)
    assert found.kind == "DeepSpeed folder of train_dalle.py"


def test_a_folder_without_its_auxiliary_file_asks_for_what_that_would_tell(tmp_path, beside):
    step = deepspeed_folder(tmp_path / "dalle-ds-cp", "1.6.6-plain")
    (tmp_path / "dalle-ds-cp/auxiliary.pt").unlink()
    content = {"module": OrderedDict(old("1.6.6-plain").weights), "global_steps": 3}
    torch.save(content, step / "mp_rank_00_model_states.pt")
    kinds = tuple(old("1.6.6-plain").settings["attn_types"])
    missing = describe(tmp_path / "dalle-ds-cp", Choices(kinds, num_heads=2)).missing
    assert any("conv_like" in each for each in missing)
    told = Choices(kinds, "1.6.6", num_heads=2)
    found = import_model(tmp_path / "dalle-ds-cp", told, beside).require("transformer")
    assert isinstance(found, LegacyTransformer)
    assert found.config.attention_kinds[-1] == "conv_up_left"


def shared_out(value, num_ranks):
    """Each rank's part of a weight, as ZeRO-3 cuts it: equal parts, the last one padded."""
    size = -(-value.numel() // num_ranks)
    padded = torch.zeros(size * num_ranks)
    padded[: value.numel()] = value.flatten()
    return padded.split(size)


def zero_3(step, num_ranks, state, param_shapes=None, *, cuts_frozen=False):
    """Write each rank's share of the weights, as ZeRO-3 does; the VAE is frozen and whole.

    param_shapes: in place of some weights' own. cuts_frozen: the VAE is cut too, as it is by
    DeepSpeed of 2023 and later, whose tensors also have attributes.
    """
    trained = {name: each for name, each in state.items() if not name.startswith("vae.")}
    buffers = {"logits_mask": trained.pop("logits_mask")}
    shapes = OrderedDict((name, each.shape) for name, each in trained.items())
    shapes |= param_shapes or {}
    shares: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
    for value in trained.values():
        for rank, part in enumerate(shared_out(value, num_ranks)):
            shares[rank].append(part)
    frozen = {name: each for name, each in state.items() if name.startswith("vae.")}
    empty = OrderedDict((name, torch.empty(0)) for name in (trained | frozen))
    module = empty | buffers | ({} if cuts_frozen else frozen)
    for rank, parts in enumerate(shares):
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        states = {"module": module, "param_shapes": [shapes], "dp_world_size": num_ranks}
        whole = torch.cat(parts)
        groups = [whole[:1000], whole[1000:]]
        if cuts_frozen:
            states["frozen_param_shapes"] = {name: each.shape for name, each in frozen.items()}
            states["frozen_param_fragments"] = {
                name: shared_out(each, num_ranks)[rank].clone() for name, each in frozen.items()
            }
            vars(groups[0])["ds_tag"] = "of DeepSpeed"
        torch.save(states, step / f"{prefix}_model_states.pt")
        optimizer = {"zero_stage": 3, "partition_count": num_ranks, "fp32_flat_groups": groups}
        torch.save({"optimizer_state_dict": optimizer}, step / f"{prefix}_optim_states.pt")


def test_the_shards_of_zero_3_are_put_together(tmp_path, weights, beside):
    step = deepspeed_folder(tmp_path / "dalle-ds-cp", NAME)
    zero_3(step, 3, old(NAME).weights)
    assert_same(tmp_path / "dalle-ds-cp", weights, beside)


def test_a_frozen_vae_that_zero_3_cut_is_put_together_too(tmp_path, weights, beside):
    folder = tmp_path / "dalle-ds-cp"
    step = deepspeed_folder(folder, NAME)
    zero_3(step, 3, old(NAME).weights, cuts_frozen=True)
    assert_same(folder, weights, beside)
    vae = import_model(folder, PLAIN, beside).require("dvae").state_dict()
    assert torch.equal(vae["codebook.weight"], old(NAME).weights["vae.codebook.weight"])
    (step / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ForeignFileError, match=r"fragments end before the weight vae\..* missing"):
        import_model(folder, PLAIN, beside)


def test_shards_of_other_ranks_or_with_more_than_the_weights_are_refused(tmp_path, beside):
    folder = tmp_path / "dalle-ds-cp"
    step = deepspeed_folder(folder, NAME)
    zero_3(step, 2, old(NAME).weights)
    first, second = sorted(step.glob("*optim_states.pt"))
    third = step / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    shutil.copy(second, third)
    with pytest.raises(ForeignFileError, match=r"partition_count \[2\], and there are 3 shards"):
        import_model(folder, PLAIN, beside)
    second.unlink()
    with pytest.raises(ForeignFileError, match=r"must be 0, 1, 2, …, found \[0, 2\]"):
        import_model(folder, PLAIN, beside)
    third.rename(second)
    flat = torch.load(second)["optimizer_state_dict"]["fp32_flat_groups"]
    optimizer = {"partition_count": [2, 2], "fp32_flat_groups": [*flat, torch.zeros(5)]}
    torch.save({"optimizer_state_dict": optimizer}, second)
    import_model(folder, PLAIN, beside)
    optimizer["fp32_flat_groups"][-1][4] = 1
    torch.save({"optimizer_state_dict": optimizer}, second)
    with pytest.raises(ForeignFileError, match="the shards go on after the last weight"):
        import_model(folder, PLAIN, beside)


@pytest.mark.parametrize("shape", [(-1, 4), (0, 2**70)])
def test_a_shape_of_zero_3_that_is_none_is_refused_by_its_weight(shape, tmp_path, beside):
    folder = tmp_path / "dalle-ds-cp"
    shapes = {"text_emb.weight": shape}
    zero_3(deepspeed_folder(folder, NAME), 1, old(NAME).weights, shapes)
    with pytest.raises(ForeignFileError, match=r"param_shapes, the weight text_emb\.weight"):
        import_model(folder, PLAIN, beside)


def test_a_folder_of_mindalle_is_told_which_of_its_files_to_give(tmp_path, beside):
    (tmp_path / "stage2_last.ckpt").write_bytes(b"")
    with pytest.raises(ForeignFileError, match=r"of minDALL-E's: give the file stage2_last\.ckpt"):
        import_model(tmp_path, PLAIN, beside)


def test_a_folder_without_its_shards_or_of_missing_steps_is_refused(tmp_path, beside):
    folder = tmp_path / "dalle-ds-cp"
    step = deepspeed_folder(folder, NAME)
    zero_3(step, 2, old(NAME).weights)
    shards = sorted(step.glob("*optim_states.pt"))
    for shard in shards:
        shard.unlink()
    with pytest.raises(ForeignFileError, match="as under ZeRO-3"):
        import_model(folder, PLAIN, beside)
    (folder / "latest").write_text("global_step9")
    with pytest.raises(ForeignFileError, match="latest names 'global_step9'"):
        import_model(folder, PLAIN, beside)
    with pytest.raises(ForeignFileError, match=r"auxiliary.pt of a DeepSpeed checkpoint"):
        import_model(folder / "auxiliary.pt", PLAIN, beside)
    with pytest.raises(ForeignFileError, match="no folder of a DeepSpeed checkpoint"):
        import_model(step, PLAIN, beside)
