"""Fixtures that several test files share: directories laid out as SageMaker lays out /opt/ml, and
tiny models with random weights."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

# One thread for each of the processes, which are many, before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Before anything imports Triton, whose own functions are made for a GPU or for its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


from dalle import artefact as artefacts
from dalle.models import sizes
from dalle.models.clip import Clip, ClipConfig
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.platform.user import name_user
from dalle.preprocess.tokenizer import CaptionTokenizer
from infra.local.opt_ml import OptMl
from training import rainbow

pytest_plugins = [
    "tests.inference.server.app_fixtures",
    "tests.infra.aws_fixtures",
    "tests.image.docker_fixtures",
    "tests.infra.endpoint_fixtures",
    "tests.infra.registry_fixtures",
]

torch.set_num_threads(1)
name_user()  # as the commands do: torch and Triton ask for it when they are used


def pytest_collection_modifyitems(items):
    """Put the files with the most slow tests first, and leave out what needs a GPU without one.

    The processes of pytest-xdist take files in this order, so none is left alone with a long one.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _keep_denormal_numbers():
    """A job flushes them to zero, in whose process hypothesis would refuse to draw numbers."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def make_opt_ml(tmp_path):
    """A function: shape -> a new tree of that shape."""

    def make(shape: str = "platform") -> OptMl:
        return OptMl(tmp_path / f"ml-{shape}", shape)

    return make


@pytest.fixture
def opt_ml(make_opt_ml):
    """A tree as the platform lays it out, without channels or hyperparameters yet."""
    return make_opt_ml("platform")


@pytest.fixture(scope="session")
def make_dalle():
    """A function: config fields -> a tiny transformer in evaluation mode, without gradients. Its
    weights are random and large, so that every input sways every output that may see it."""

    def make(**fields: object) -> Dalle:
        tokens = {"text_vocab_size": 11, "text_length": 5, "grid_size": 4, "codebook_size": 7}
        shape = {"num_codebooks": 2, "width": 16, "num_layers": 2, "num_heads": 2}
        model = Dalle(TransformerConfig(**(tokens | shape | fields))).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
        return model.eval()

    return make


def build_tiny_models() -> artefacts.Artefact:
    """All four components, untrained: captions of the rainbow words in 8 text tokens, pictures of
    16 pixels as a grid of 4x4 positions."""
    captions = [sample.caption for sample in rainbow.samples()]
    tokenizer = CaptionTokenizer.train(captions, kind="word", text_length=8)
    torch.manual_seed(0)
    dvae = DiscreteVAE(DVAEConfig(**sizes.DVAE_SIZES["tiny"]))
    transformer = Dalle(
        TransformerConfig(
            text_vocab_size=tokenizer.vocab_size,
            text_length=tokenizer.text_length,
            grid_size=dvae.config.grid_size,
            codebook_size=dvae.config.codebook_size,
            num_codebooks=dvae.config.num_codebooks,
            **sizes.TRANSFORMER_SIZES["tiny"],
        )
    )
    clip = Clip(
        ClipConfig(
            image_size=dvae.config.image_size,
            text_vocab_size=tokenizer.vocab_size + 1,
            text_length=tokenizer.text_length + 1,
            **sizes.CLIP_SIZES["tiny"],
        )
    )
    for model in (dvae, transformer, clip):
        model.eval().requires_grad_(False)
    return artefacts.Artefact(dvae, transformer, clip, tokenizer)


@pytest.fixture(scope="session")
def tiny_models() -> artefacts.Artefact:
    """What `build_tiny_models` makes. Shared by the session: not to be changed."""
    return build_tiny_models()


@pytest.fixture(scope="session")
def tiny_artefact(tiny_models, tmp_path_factory) -> Path:
    """The directory of an artefact with the tiny models. Shared by the session: copy it to change
    it."""
    directory: Path = tmp_path_factory.mktemp("artefact")
    artefacts.save(directory, tiny_models)
    return directory


@pytest.fixture
def artefact_copy(tiny_artefact, tmp_path) -> Path:
    """A copy of the tiny artefact, to be spoilt."""
    copy: Path = shutil.copytree(tiny_artefact, tmp_path / "model")
    return copy
