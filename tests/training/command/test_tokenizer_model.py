"""The channel `tokenizer_model`: a job trains on a published image tokenizer, or refuses its files
with exit code 2."""

import base64
import json

import pytest
import torch

from dalle import artefact as artefacts
from dalle.preprocess.images import decode_image, encode_image
from tests.inference.served import running
from tests.training import two_hosts
from tests.training.job.pretrained.published.files import content_of, put, save, yaml_of
from tests.training.two_hosts import SAMPLES, fill
from training.__main__ import main
from training.job.pretrained.image_tokenizer import load_image_tokenizer

pytestmark = pytest.mark.slow

SETTINGS = two_hosts.TINY | {"max_steps": 2}


def run(tree, *options):
    return main(["--root", str(tree.root), *options])


def files_of(tree):
    return {str(path.relative_to(tree.root)) for path in tree.root.rglob("*") if path.is_file()}


@pytest.fixture
def job(opt_ml):
    """A function: a tokenizer's name and settings -> a job that trains on its tokens."""

    def make(name, **settings):
        fill(opt_ml.add_channel("train"), SAMPLES[:8])
        put(name, opt_ml.add_channel("tokenizer_model"))
        opt_ml.set_hyperparameters(**SETTINGS | settings)
        return opt_ml

    return make


def test_a_model_is_trained_on_the_tokens_of_a_frozen_vqgan_and_served(job, caplog):
    tree = job("vqgan", image_size=16)
    assert run(tree) == 0, tree.failure
    model = artefacts.load(tree.root / "model")
    assert model.components() == ["dvae", "transformer", "clip", "tokenizer"]
    assert [record.stage for record in model.manifest.stages] == ["transformer", "clip"]
    config = model.require("transformer").config
    assert (config.grid_size, config.codebook_size, config.num_codebooks) == (4, 24, 1)
    assert model.require("clip").config.image_size == 16
    original = load_image_tokenizer(tree.root / "input/data/tokenizer_model", 16).state_dict()
    kept = model.require("dvae").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in original.items())
    assert "has no effect" not in caplog.text
    assert "data:image" in (tree.root / "output/data/report.html").read_text()
    assert "VQGAN, not trained here" in (tree.root / "model/MODEL_CARD.md").read_text()

    picture = base64.b64encode(encode_image(SAMPLES[0].picture(), "png")).decode()
    with running(tree.root) as served:
        served.ready()
        reply = served.ask(accept="application/jsonlines", preview_rows=1)
        events = [json.loads(line) for line in reply.text.splitlines()]
        primed = served.ask(prime_image=picture, prime_rows=2).json()
    previews = [event for event in events if event["event"] == "preview"]
    assert {event["rows"] for event in previews} == {1, 2, 3}
    for encoded in (previews[0], primed["images"][0]):
        image = decode_image(base64.b64decode(encoded["image"]), what="image")
        assert image.size == (16, 16)


def nan_weight(folder):
    content = content_of("vae")
    content["weights"]["codebook.weight"] = torch.full((24, 12), torch.nan)
    save(content, folder / "vae.pt")


def truncated(folder):
    path = folder / "vq_8.pt"
    path.write_bytes(path.read_bytes()[:5000])


def other_yaml(folder):
    content = yaml_of("vqgan")
    content["model"]["params"]["n_embed"] = 25
    (folder / "model.yaml").write_text(json.dumps(content))


class Calls:
    def __reduce__(self):
        return print, ("owned",)


@pytest.mark.parametrize(
    ("name", "spoil", "settings", "says"),
    [
        ("vae", lambda folder: (folder / "vae.pt").unlink(), {}, "it has no file"),
        (
            "vae",
            lambda folder: (folder / "vae.pt").rename(folder / "README"),
            {},
            "it has only RE",
        ),
        ("vae", lambda folder: put("vq_8", folder), {}, "it has vae.pt, vq_8.pt"),
        ("vqgan", other_yaml, {}, "quantize.embedding.weight has the shape [24, 8]"),
        ("vae", nan_weight, {}, "the weight codebook.weight has values that are not finite"),
        ("vqgan", lambda folder: None, {"image_size": 30}, "image_size must be a multiple of 4"),
        ("openai", lambda folder: save(Calls(), folder / "encoder.pkl"), {}, "it names "),
        ("vq_8", truncated, {}, "vq_8.pt cannot be read as weights"),
    ],
)
def test_a_refused_file_ends_the_job_with_exit_code_2_and_nothing_is_written(
    job, capfd, name, spoil, settings, says
):
    tree = job(name, **settings)
    spoil(tree.root / "input/data/tokenizer_model")
    before = files_of(tree)
    assert run(tree) == 2
    assert says in tree.failure
    assert files_of(tree) - before == {"output/failure"}
    assert run(tree, "--plan") == 2
    printed = capfd.readouterr()
    assert says in printed.err
    assert "owned" not in printed.out


def test_a_refused_clip_ends_the_job_with_exit_code_2_too(job):
    tree = job("vae")
    torch.save({"logit_scale": torch.tensor(1.0)}, tree.add_channel("clip") / "clip.pt")
    assert run(tree) == 2
    assert tree.failure.startswith("clip.pt is not a CLIP: it lacks ")


def test_settings_of_the_stage_dvae_are_refused(job):
    tree = job("vae", dvae_epochs=3)
    assert run(tree) == 1
    assert tree.failure.startswith("hyperparameter dvae_epochs is of the stage dvae, which is not")


def test_an_artefact_with_an_image_tokenizer_of_its_own_is_refused(job, tiny_models):
    tree = job("vae")
    artefacts.save(tree.add_channel("artefact"), tiny_models)
    assert run(tree) == 1
    assert tree.failure.startswith("the channels artefact and tokenizer_model both bring an image")


def test_the_plan_counts_the_weights_of_a_published_image_tokenizer(job, capsys):
    tree = job("vae", size="tiny", stage="transformer")
    assert run(tree, "--plan", "--json", "--device-memory", "24g") == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    frozen = sum(value.numel() for value in content_of("vae")["weights"].values())
    expected = 4 * (frozen + stage["num_parameters"])
    assert stage["job"]["memory"]["weights"] == pytest.approx(expected, rel=0.01)
