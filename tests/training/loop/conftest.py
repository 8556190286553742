"""The training loop around a stage of a handful of weights."""

import io
import threading

import pytest
import torch

from training.config.hyperparameters import parse
from training.engine.torch_engine import TorchEngine
from training.loop.checkpoints import Checkpoints
from training.loop.loop import fit
from training.loop.metrics import Metrics

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    """A function that fits a TinyStage; everything is kept between calls, as on one disk."""

    def run(stage, raw, *, stop=None, clock=None, place="a"):
        raw = {"log_every": "3", "warmup_steps": "2", "num_validations": "2", **raw}
        settings = parse(raw)
        root = tmp_path / place
        with Metrics(root / "metrics.jsonl", root / "tb", output=io.StringIO()) as metrics:
            return fit(
                stage,
                settings,
                engine=TorchEngine(stage, settings.dvae, CPU),
                checkpoints=Checkpoints(
                    root / "checkpoints",
                    identity={**settings.dvae.identity(), **stage.identity()},
                ),
                metrics=metrics,
                stop=stop or threading.Event(),
                **({"clock": clock} if clock else {}),
            )

    return run
