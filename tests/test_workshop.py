"""training.workshop: a job's data and models, opened from its channels."""

import threading

import numpy as np
import torch

from dalle.contract import prepare_outputs, read_job
from dalle.images import encode_image
from training.hyperparameters import parse
from training.workshop import Workshop


def fill(folder, num_pairs):
    for number in range(num_pairs):
        pixels = np.full((16, 16, 3), number, dtype=np.uint8)
        (folder / f"{number}.png").write_bytes(encode_image(pixels, "png"))
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


def test_validation_leaves_out_no_pair(opt_ml):
    fill(opt_ml.add_channel("train"), 4)
    fill(opt_ml.add_channel("validation"), 5)
    job = read_job(opt_ml.root, {"DALLE_DEVICE": "cpu"})
    prepare_outputs(job.paths)
    settings = parse({"size": "tiny", "image_size": "16", "batch_size": "4"})
    workshop = Workshop(job, settings, torch.device("cpu"), threading.Event())
    stage = workshop.build("dvae")
    sizes = [len(batch.captions) for batch in stage.data.validation_batches()]
    assert sizes == [4, 1]
