"""What SageMaker puts under /opt/ml for a training job, on this machine: lay out, run, pack.

Standard library only.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.docker import Container, image_name

STOP_TRAINING_SECONDS = 120
"""Between SIGTERM and SIGKILL on the platform."""

# One host's files as they were logged on SageMaker, and as the SDK's local mode writes them.
RESOURCE_CONFIG: dict[str, dict[str, Any]] = {
    "platform": {
        "current_group_name": "homogeneousCluster",
        "current_host": "algo-1",
        "current_instance_type": "ml.g5.xlarge",
        "hosts": ["algo-1"],
        "instance_groups": [
            {
                "hosts": ["algo-1"],
                "instance_group_name": "homogeneousCluster",
                "instance_type": "ml.g5.xlarge",
            }
        ],
        "network_interface_name": "eth0",
        "topology": None,
    },
    "local": {
        "current_host": "algo-1",
        "hosts": ["algo-1"],
        "network_interface_name": "ethwe",
        "current_instance_type": "local_cpu",
    },
}
CHANNEL_CONFIG = {
    "platform": {
        "ContentType": "application/x-image",
        "TrainingInputMode": "File",
        "S3DistributionType": "FullyReplicated",
        "RecordWrapperType": "None",
    },
    "local": {"TrainingInputMode": "File"},
}


class OptMl:
    """The tree below /opt/ml, in a directory of this machine.

    shape: `platform`, `local` (the SDK's local mode), or `empty` (no config files at all).
    """

    def __init__(self, root: Path, shape: str) -> None:
        self.root = root
        self.shape = shape
        self.channels: dict[str, dict[str, str]] = {}
        for name in ("input/data", "model", "output/data"):
            (root / name).mkdir(parents=True, exist_ok=True)
        if shape != "empty":
            self.write("resourceconfig", RESOURCE_CONFIG[shape])
            self.write("inputdataconfig", {})
            self.write("hyperparameters", {})

    def write(self, name: str, value: object) -> Path:
        """Write input/config/<name>.json: a text unchanged, anything else as JSON."""
        path = self.root / "input" / "config" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    def set_hyperparameters(self, **values: object) -> None:
        """Write hyperparameters as the SDK does: texts unchanged, other values as JSON texts."""
        texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in values.items()}
        self.write("hyperparameters", texts)

    def add_channel(self, name: str, **settings: str) -> Path:
        """Create a channel and its entry in inputdataconfig.json; return its directory.

        settings: of the entry, such as TrainingInputMode="Pipe". A channel in Pipe mode has no
        directory; its FIFOs are beside it (see `pipes`).
        """
        directory = self.root / "input" / "data" / name
        if settings.get("TrainingInputMode") != "Pipe":
            directory.mkdir(exist_ok=True)
        if self.shape != "empty":
            self.channels[name] = CHANNEL_CONFIG[self.shape] | settings
            self.write("inputdataconfig", self.channels)
        return directory

    @property
    def failure(self) -> str:
        """The text that the platform would show as FailureReason."""
        return (self.root / "output" / "failure").read_text(encoding="utf-8")[:1024]

    def mounts(self, channels: Mapping[str, Path]) -> list[str]:
        """Return options of `docker run`: input is read-only, outputs are writable for every user.

        channels: directories outside the tree, mounted as channels of these names.
        """
        options = ["--volume", f"{(self.root / 'input').absolute()}:/opt/ml/input:ro"]
        for name, directory in channels.items():
            options += ["--volume", f"{directory.absolute()}:/opt/ml/input/data/{name}:ro"]
        for name in ("model", "output", "output/data", "output/tensorboard", "checkpoints"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
            if (self.root / name).stat().st_uid == os.getuid():
                (self.root / name).chmod(0o777)
        for name in ("model", "output", "checkpoints"):
            options += ["--volume", f"{(self.root / name).absolute()}:/opt/ml/{name}"]
        return options


def start_training(
    tree: OptMl,
    *options: str,
    image: str | None = None,
    command: Sequence[str] = ("train",),
    channels: Mapping[str, Path] | None = None,
) -> Container:
    """Start the image's `train` on a tree. channels: directories outside it, by channel name."""
    job = ["--env", "TRAINING_JOB_NAME=local"]
    return Container(
        image or image_name(), *command, options=[*job, *tree.mounts(channels or {}), *options]
    )


def pack_model(model: Path, archive: Path) -> Path:
    """Write model.tar.gz as SageMaker does: paths relative to /opt/ml/model, links as links."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for path in sorted(model.iterdir()):
            tar.add(path, path.name)
    return archive
