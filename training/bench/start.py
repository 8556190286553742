"""How long `train` takes from its command line to its first step, on a handful of pictures."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PAIRS = 64
JOB = {"stage": "dvae", "size": "tiny", "batch_size": "8", "max_steps": "1", "log_every": "1"}


def seconds_to_first_step() -> float:
    """Of a process of its own, the interpreter's start included. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_job(root)
        began = time.perf_counter()
        command = [sys.executable, "-m", "training", "--root", str(root)]
        with subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            # The first report is of the first step.
            first = next((line for line in process.stdout if "dvae_step=" in line), None)
            seconds = time.perf_counter() - began
            process.terminate()
        if first is None:
            raise subprocess.CalledProcessError(process.returncode, command)
        return seconds


def _write_job(root: Path) -> None:
    config, data = root / "input/config", root / "input/data/train"
    for directory in (config, data):
        directory.mkdir(parents=True)
    (config / "hyperparameters.json").write_text(json.dumps(JOB))
    generator = np.random.default_rng(0)
    for number in range(PAIRS):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number:03}.png")
        (data / f"{number:03}.txt").write_text(f"noise number {number}")
