"""The same 200 pairs train to the same bits, whatever layout and input mode they come in."""

import hashlib
import json
from contextlib import ExitStack

import pytest
import torch

from dalle.preprocess.images import encode_image
from dalle.types import STAGES
from infra.local.opt_ml import OptMl
from infra.local.pipes import Pipe, stream_of
from tests.training.data import layouts
from tests.training.two_hosts import TINY
from training import rainbow
from training.__main__ import main
from training.job import output

pytestmark = pytest.mark.slow

NUM_PAIRS = 200
ATTRIBUTES = "image-ref,caption"


def manifest(folder, pairs):
    """An augmented manifest of SageMaker, which comes through a pipe alone."""
    layouts.images(folder, pairs)
    rows = [
        json.dumps({"image-ref": f"{name}.png", "caption": list(captions)})
        for name, _, captions in pairs
    ]
    (folder / "pairs.manifest").write_text("\n".join(rows))


WRITE = layouts.write | {"augmented manifest": manifest}
CASES = [
    *((layout, "File") for layout in layouts.write if layout != "tar shards"),
    ("tar shards", "FastFile"),
    ("Parquet", "FastFile"),
    ("tar shards", "Pipe"),
    ("augmented manifest", "Pipe"),
]


def bits(value):
    """A value of a checkpoint with bytes in place of tensors: as numbers, 0 equals -0."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, list | tuple) else value


def first_checkpoints(layout, mode, folder, pairs):
    """Train; return stage -> its first checkpoint without times and without the files' names."""
    tree = OptMl(folder / "ml", "platform")
    often = {"max_steps": 2, "checkpoint_minutes": 1e-6, "checkpoints_kept": 9}
    tree.set_hyperparameters(**TINY, **often, seed=3)
    with ExitStack() as stack:
        if mode == "Pipe":
            WRITE[layout](folder / "data", pairs)
            content, wrapper = stream_of(folder / "data", ATTRIBUTES)
            fields = {"TrainingInputMode": mode, "RecordWrapperType": wrapper}
            stack.enter_context(Pipe(tree.add_channel("train", **fields), content))
        else:
            WRITE[layout](tree.add_channel("train", TrainingInputMode=mode), pairs)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("DALLE_DEVICE", "cpu")
        patch.setattr(output, "write_report", lambda *_: None)  # its figures take most of the time
        assert main(["--root", str(tree.root)]) == 0
    found = {}
    for stage in STAGES:
        content = torch.load(tree.root / "checkpoints" / stage / "step-000000001.pt")
        identity, state = content["identity"], content["state"]
        assert identity["num_pairs"] == NUM_PAIRS
        del identity["data"]  # a digest of names, which a Parquet file has none of
        kept = ("step", "data", "engine", "pending")
        found[stage] = bits([identity, {name: state[name] for name in kept}])
    return found


@pytest.fixture(scope="module")
def of_shards(tmp_path_factory):
    """Pairs, and the first checkpoints of a job that reads them from tar shards."""
    images = {}
    for sample in rainbow.samples()[::46]:
        image = encode_image(sample.picture(), "png")
        # Pairs of a pipe are ordered by digest, others by name: here the two orders are one.
        images[hashlib.blake2b(image, digest_size=16).hexdigest()] = image, (sample.caption,)
    pairs = [(name, *images[name]) for name in sorted(images)][:NUM_PAIRS]
    return pairs, first_checkpoints("tar shards", "File", tmp_path_factory.mktemp("a"), pairs)


@pytest.mark.parametrize(("layout", "mode"), CASES)
def test_the_first_checkpoints_are_those_of_tar_shards(of_shards, tmp_path, layout, mode):
    pairs, expected = of_shards
    found = first_checkpoints(layout, mode, tmp_path, pairs)
    for stage in STAGES:
        assert found[stage] == expected[stage], f"another first checkpoint of {stage}"
