"""Stages of the three models for the training loop: batches, loss and validation.

Knows the models and their batches; knows nothing of jobs, files or checkpoints.
Letters: B batch, N image-token positions, M codebooks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dalle.models.clip import Clip
from dalle.models.dvae import DiscreteVAE
from dalle.models.image_tokenizer import ImageTokenizer
from dalle.models.reduction import ONE_RANK, Ranks
from dalle.models.transformer import Dalle
from dalle.types import StageName
from training.data.batching.batches import Batch, Batches
from training.data.batching.preload import Preloaded, float_chunks
from training.data.batching.token_cache import TokenCache
from training.stopping import NEVER, Stop, Stopped, unless_stopped


@dataclass(frozen=True)
class StageData:
    """Training and validation batches of a stage.

    validation: a fixed set of batches in a fixed order, None without validation pairs.
    stop: checked between two batches outside the training loop.
    ranks: share the training batches. Each validates on all validation pairs, or with
        `is_validation_parted` on those of its host.
    """

    train: Batches
    validation: Batches | None
    device: torch.device
    stop: Stop = NEVER
    ranks: Ranks = ONE_RANK
    is_validation_parted: bool = False

    def validation_means(
        self, measure: Callable[[Batch], Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Return means over all validation pairs, from means over a batch; empty without pairs.

        Raises Stopped, on every rank when the pairs are parted.
        """
        num_pairs = 0
        sums: dict[str, Tensor] = {}
        is_stopped = False
        try:
            for batch in self.validation_batches():
                num_pairs += len(batch.captions)  # the last one may be shorter
                for name, mean in measure(batch).items():
                    sums[name] = sums.get(name, 0) + mean * len(batch.captions)
        except Stopped:
            is_stopped = True
        if self.is_validation_parted:
            is_stopped = bool(self.ranks.total(torch.tensor(float(is_stopped))))
        if is_stopped:
            raise Stopped
        totals = {name: float(total) for name, total in sums.items()}
        if self.is_validation_parted:
            own = torch.tensor([num_pairs, *totals.values()], dtype=torch.float64)
            num_pairs, *rest = self.ranks.total(own).tolist()
            totals = dict(zip(totals, rest, strict=True))
        return {name: total / num_pairs for name, total in totals.items()}

    def validation_batches(self) -> Iterator[Batch]:
        """Yield all validation batches on the stage's device. Raises Stopped."""
        if self.validation is None:
            return
        with self.validation as batches:  # the loader's workers end with each pass
            for step in unless_stopped(range(batches.num_per_epoch), self.stop):
                yield batches.batch(step).to(self.device)


class DVAEStage:
    """Training of the dVAE: images to image tokens and back."""

    name: StageName = "dvae"

    def __init__(self, model: DiscreteVAE, data: StageData) -> None:
        self.model: DiscreteVAE = model
        self.data = data
        self.batches = data.train

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        images = batch.images.to(self.data.device, non_blocking=True)
        loss = self.model.loss(images, progress, self.data.ranks)
        return loss.total, {
            "reconstruction_loss": loss.reconstruction.detach(),
            "codebook_perplexity": self.model.quantiser.perplexity().mean(),
            "dead_codes": self.model.quantiser.dead().sum(),
        }

    def validate(self) -> Mapping[str, float]:
        return self.data.validation_means(
            lambda batch: {"validation_loss": self.model.reconstruction_loss(batch.images)}
        )

    def identity(self) -> Mapping[str, Any]:
        return self.batches.identity() | {"dvae_config": asdict(self.model.config)}


class TransformerStage:
    """Training of the transformer on a caption's tokens and the image tokens of a frozen dVAE.

    The constructor encodes all images of a preloaded data set. It raises Stopped.
    """

    name: StageName = "transformer"

    def __init__(
        self,
        model: Dalle,
        dvae: ImageTokenizer,
        data: StageData,
        *,
        trained_on_from: str = "",
    ) -> None:
        """trained_on_from: hash of the weights that the model has, empty for random ones."""
        self.model: Dalle = model
        self._trained_on_from = trained_on_from
        self.dvae = dvae
        self.data = data
        self.batches = data.train
        self._table: Tensor | None = None
        self._mirrored_table: Tensor | None = None
        if isinstance(data.train.dataset, Preloaded):
            # The dVAE is frozen: images in memory are encoded once, not in every epoch.
            self._table = _encode_all(dvae, data.train.dataset.images, data)
            if data.train.mirrorable is not None:
                mirrored = data.train.dataset.images.flip(-1)
                self._mirrored_table = _encode_all(dvae, mirrored, data)
        elif isinstance(data.train.dataset, TokenCache):
            self._table = data.train.dataset.tokens

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        indices = batch.indices
        batch = batch.to(self.data.device)
        assert batch.text_tokens is not None
        if self._table is not None:
            rows = self._table[indices.to(self._table.device)]
            if self._mirrored_table is not None and batch.mirrored is not None:
                turned = self._mirrored_table[indices.to(self._mirrored_table.device)]
                rows = torch.where(batch.mirrored.to(rows.device)[:, None, None], turned, rows)
            image_tokens = rows.to(self.data.device).long()
        else:
            # Rounded by autocast, some images would have other tokens than in fp32.
            with torch.autocast(self.data.device.type, enabled=False):
                image_tokens = self.dvae.encode(batch.images)
        loss = self.model.loss(
            batch.text_tokens,
            image_tokens,
            self.data.ranks,
            step_text_tokens=batch.step_text_tokens,
        )
        return loss.total, {"image_loss": loss.image.detach(), "text_loss": loss.text.detach()}

    def validate(self) -> Mapping[str, float]:
        def measure(batch: Batch) -> Mapping[str, Tensor]:
            assert batch.text_tokens is not None
            loss = self.model.loss(batch.text_tokens, self.dvae.encode(batch.images))
            return {
                "validation_loss": loss.total,
                "validation_image_loss": loss.image,
                "validation_text_loss": loss.text,
            }

        return self.data.validation_means(measure)

    def identity(self) -> Mapping[str, Any]:
        identity = self.batches.identity() | {
            "transformer_config": asdict(self.model.config),
            "dvae_weights": weights_hash(self.dvae),
        }
        if self._trained_on_from:
            identity["trained_on_from"] = self._trained_on_from
        return identity


class ClipStage:
    """Training of CLIP: which caption belongs to which image.

    In a preloaded data set, pairs with equal images count as matching one another.
    """

    name: StageName = "clip"

    def __init__(self, model: Clip, data: StageData, *, trained_on_from: str = "") -> None:
        """trained_on_from: hash of the weights that the model has, empty for random ones."""
        self._trained_on_from = trained_on_from
        self.model: Clip = model
        self.data = data
        self.batches = data.train
        self._image_numbers: Tensor | None = None
        if isinstance(data.train.dataset, Preloaded):
            self._image_numbers = _image_numbers_of(data.train.dataset).to(data.device)

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        batch = batch.to(self.data.device)
        assert batch.text_tokens is not None
        numbers = None if self._image_numbers is None else self._image_numbers[batch.indices]
        loss = self.model.loss(
            batch.images, batch.text_tokens, self.data.ranks, image_numbers=numbers
        )
        return loss.total, {"accuracy": loss.accuracy.detach()}

    def validate(self) -> Mapping[str, float]:
        def measure(batch: Batch) -> Mapping[str, Tensor]:
            assert batch.text_tokens is not None
            loss = self.model.loss(batch.images, batch.text_tokens)
            return {"validation_loss": loss.total, "validation_accuracy": loss.accuracy}

        return self.data.validation_means(measure)

    def identity(self) -> Mapping[str, Any]:
        identity = self.batches.identity() | {"clip_config": asdict(self.model.config)}
        if self._trained_on_from:
            identity["trained_on_from"] = self._trained_on_from
        return identity


def weights_hash(model: nn.Module) -> str:
    """Return the sha256 of a model's weights; models with equal hashes compute the same."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _image_numbers_of(dataset: Preloaded) -> Tensor:
    """Return a number for every pair, [pairs] int64, equal for images with equal pixels.

    A digest of the image, so that it is equal on hosts with different pairs.
    """
    digests = (
        hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in dataset.images.numpy()
    )
    return torch.tensor([int.from_bytes(digest, signed=True) for digest in digests])


def _encode_all(dvae: ImageTokenizer, pictures: Tensor, data: StageData) -> Tensor:
    """Return the image tokens of every picture uint8 [pairs, 3, H, W]: [pairs, N, M] int32."""
    chunks = [
        dvae.encode(images).int() for images in float_chunks(pictures, data.device, data.stop)
    ]
    return torch.cat(chunks)
