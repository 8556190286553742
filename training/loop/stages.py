"""The three models as the training loop sees them: their batches, loss and validation.

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
from dalle.models.reduction import ONE_RANK, Ranks
from dalle.models.transformer import Dalle
from dalle.types import StageName
from training.data.batching.batches import Batch, Batches
from training.data.batching.preload import Preloaded, float_chunks
from training.data.batching.token_cache import TokenCache
from training.stopping import NEVER, Stop, Stopped, unless_stopped


@dataclass(frozen=True)
class StageData:
    """What every stage trains and validates on.

    validation: a fixed set of batches in a fixed order, None without held-out pairs.
    stop: looked at between two batches of work that is not the training loop's.
    ranks: those that share out the training batches; every one validates by itself, unless
        `is_validation_parted`: each host then has other held-out pairs.
    """

    train: Batches
    validation: Batches | None
    device: torch.device
    stop: Stop = NEVER
    ranks: Ranks = ONE_RANK
    is_validation_parted: bool = False

    def batch(self, batch: Batch) -> Batch:
        """A batch on the stage's device."""
        return batch.to(self.device)

    def validation_means(
        self, measure: Callable[[Batch], Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Means over all held-out pairs of numbers that are means over a batch; empty without any.

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
        """All of them, on the stage's device. Raises Stopped."""
        if self.validation is None:
            return
        with self.validation as batches:  # every pass begins anew: its workers end with it
            for step in unless_stopped(range(batches.num_per_epoch), self.stop):
                yield self.batch(batches.batch(step))

    def identity(self) -> dict[str, Any]:
        return self.train.identity()


class DVAEStage:
    """Learns to draw an image from its own tokens."""

    name: StageName = "dvae"

    def __init__(self, model: DiscreteVAE, data: StageData) -> None:
        self.model: DiscreteVAE = model
        self.data = data
        self.batches = data.train

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss = self.model.loss(self.data.batch(batch).images, progress, self.data.ranks)
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
        return self.data.identity() | {"dvae_config": asdict(self.model.config)}


class TransformerStage:
    """Learns the image tokens of a frozen dVAE, and the caption's own, one after another.

    Making one encodes the images of a small data set, and raises Stopped in the midst of it.
    """

    name: StageName = "transformer"

    def __init__(self, model: Dalle, dvae: DiscreteVAE, data: StageData) -> None:
        self.model: Dalle = model
        self.dvae = dvae
        self.data = data
        self.batches = data.train
        self._table: Tensor | None = None
        if isinstance(data.train.dataset, Preloaded):
            # The dVAE is frozen: what fits into memory is encoded once, not once an epoch.
            self._table = _encode_all(dvae, data.train.dataset, data)
        elif isinstance(data.train.dataset, TokenCache):
            self._table = data.train.dataset.tokens

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        indices = batch.indices
        batch = self.data.batch(batch)
        assert batch.text_tokens is not None
        if self._table is not None:
            rows = self._table[indices.to(self._table.device)]
            image_tokens = rows.to(self.data.device).long()
        else:
            # Rounded by autocast, some images would have other tokens than when they are drawn.
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
        return self.data.identity() | {
            "transformer_config": asdict(self.model.config),
            "dvae_weights": weights_hash(self.dvae),
        }


class ClipStage:
    """Learns which caption belongs to which image.

    In a small data set, pairs whose images are equal count as one another's.
    """

    name: StageName = "clip"

    def __init__(self, model: Clip, data: StageData) -> None:
        self.model: Clip = model
        self.data = data
        self.batches = data.train
        self._pictures: Tensor | None = None
        if isinstance(data.train.dataset, Preloaded):
            self._pictures = _number_pictures(data.train.dataset).to(data.device)

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        batch = self.data.batch(batch)
        assert batch.text_tokens is not None
        pictures = None if self._pictures is None else self._pictures[batch.indices]
        loss = self.model.loss(batch.images, batch.text_tokens, self.data.ranks, pictures=pictures)
        return loss.total, {"accuracy": loss.accuracy.detach()}

    def validate(self) -> Mapping[str, float]:
        def measure(batch: Batch) -> Mapping[str, Tensor]:
            assert batch.text_tokens is not None
            loss = self.model.loss(batch.images, batch.text_tokens)
            return {"validation_loss": loss.total, "validation_accuracy": loss.accuracy}

        return self.data.validation_means(measure)

    def identity(self) -> Mapping[str, Any]:
        return self.data.identity() | {"clip_config": asdict(self.model.config)}


def weights_hash(model: nn.Module) -> str:
    """sha256 over a model's weights: two models with the same one compute the same."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _number_pictures(dataset: Preloaded) -> Tensor:
    """A number for every pair, [pairs] int64: the same where the images are, pixel by pixel.

    Digests of the images, so that it is the same on all hosts, whose pairs may be others.
    """
    digests = (
        hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in dataset.images.numpy()
    )
    return torch.tensor([int.from_bytes(digest, signed=True) for digest in digests])


def _encode_all(dvae: DiscreteVAE, dataset: Preloaded, data: StageData) -> Tensor:
    """Image tokens of every pair, [pairs, N, M] int32."""
    chunks = [
        dvae.encode(images).int() for images in float_chunks(dataset.images, data.device, data.stop)
    ]
    return torch.cat(chunks)
