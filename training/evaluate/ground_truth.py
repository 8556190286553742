"""The real images that generated ones are compared with: classes, and the nearest one.

A class is one distinct image of a data set, pixel by pixel, with all its captions. Knows nothing of
models and vocabularies.
Letters: C classes, Q queries, S image size.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle.errors import DataError
from training.data.batching.nearest import nearest
from training.data.batching.preload import preload_if_small, to_chw
from training.data.pairs import Dataset, image_or_skip
from training.data.sources.channel import open_channel

TRAIN, VALIDATION, ATTRIBUTES = "train", "validation", "attributes.json"

Attributes = Mapping[str, Mapping[str, str]]  # caption -> attribute -> word


class GroundTruth:
    """All distinct images of two data sets, with their captions.

    held_out: the captions of `validation`, each once, in their order.
    captions: class -> its captions. in_training: class -> whether `train` has the image.
    attributes: caption -> attribute -> word; may lack captions, or be empty.
    fingerprint: of the data set `train`.
    """

    def __init__(
        self, train: Dataset, validation: Dataset, attributes: Attributes | None = None
    ) -> None:
        """Read all images once; count unusable ones in the skips of their data set.

        Raises DataError when too many cannot be used.
        """
        if train.image_size != validation.image_size:
            raise ValueError(f"image sizes: {train.image_size} and {validation.image_size}")
        self.image_size = train.image_size
        self.fingerprint = train.fingerprint
        self.attributes: Attributes = attributes or {}
        self.captions: list[set[str]] = []
        self.in_training: list[bool] = []
        self._where: list[tuple[Dataset, int]] = []
        classes_of: defaultdict[str, set[int]] = defaultdict(set)
        held_out: dict[str, None] = {}
        class_of_digest: dict[bytes, int] = {}
        for dataset in (train, validation):
            for index, pixels in _usable_images(dataset):
                digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
                number = class_of_digest.setdefault(digest, len(self.captions))
                if number == len(self.captions):
                    self.captions.append(set())
                    self.in_training.append(dataset is train)
                    self._where.append((dataset, index))
                for caption in dataset.captions(index):
                    self.captions[number].add(caption)
                    classes_of[caption].add(number)
                    if dataset is validation:
                        held_out[caption] = None
        self.held_out = list(held_out)
        self._classes_of = {caption: frozenset(own) for caption, own in classes_of.items()}

    def __len__(self) -> int:
        """Return C."""
        return len(self.captions)

    def own(self, caption: str) -> frozenset[int]:
        """Return the classes of a caption; several when it goes with different images."""
        return self._classes_of[caption]

    def is_novel(self, caption: str) -> bool:
        """Return whether no image of the caption occurs in training, under any caption."""
        return not any(self.in_training[number] for number in self.own(caption))

    def has_word(self, number: int, attribute: str, word: str) -> bool:
        """Return whether any caption of the class `number` has this word for the attribute."""
        return any(
            self.attributes.get(caption, {}).get(attribute) == word
            for caption in self.captions[number]
        )

    def images(self, numbers: Sequence[int]) -> Tensor:
        """Return the images of some classes, uint8 [len(numbers), 3, S, S]."""
        images = torch.empty((len(numbers), 3, self.image_size, self.image_size), dtype=torch.uint8)
        for row, number in enumerate(numbers):
            dataset, index = self._where[number]
            images[row] = to_chw(dataset.image(index))
        return images

    def nearest(self, images: Tensor) -> Tensor:
        """Return the class whose image is nearest in L2 over all pixels; of equals the first.

        images: uint8 [Q, 3, S, S]. Returns [Q] int64. One pass over all classes.
        """
        return nearest(images, len(self), self.images)[0]


def read_ground_truth(directory: Path, image_size: int) -> GroundTruth:
    """Read `train/` and `validation/` below a directory, and its `attributes.json` if there is one.

    Raises DataError naming the folder or file that cannot be used.
    """
    train, validation = (
        preload_if_small(open_channel(directory / name, image_size=image_size, channel=name))
        for name in (TRAIN, VALIDATION)
    )
    return GroundTruth(train, validation, read_attributes(directory / ATTRIBUTES))


def read_attributes(path: Path) -> Attributes:
    """Read caption -> attribute -> word from a JSON file; empty without one. Raises DataError."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    wanted = 'it must be {"a caption": {"an attribute": "its word", …}, …}'
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; {wanted}")
    for caption, words in content.items():
        if not isinstance(words, dict) or not all(isinstance(each, str) for each in words.values()):
            raise DataError(f"{path}: {caption[:80]!r} has {words!r:.80}; {wanted}")
    return content


def _usable_images(dataset: Dataset) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the usable images of a data set with their numbers."""
    for index in tqdm(
        range(len(dataset)), f"comparing {dataset.channel}", unit="images", disable=None, delay=1
    ):
        if (pixels := image_or_skip(dataset, index)) is not None:
            yield index, pixels
    dataset.skips.check_share(dataset.max_bad_share)
