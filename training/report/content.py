"""The content of a job's report as plain values. Knows nothing of HTML or figures.

Every part is optional: a report holds what its job did.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dalle.manifest import ChosenSampling, StageRecord
from dalle.preprocess.images import Pixels
from training.data.pairs import Dataset, Totals
from training.data.skips import SkipReason

log = logging.getLogger(__name__)

Curve = Sequence[tuple[int, float]]  # (step, value), steps ascending


@dataclass(frozen=True, kw_only=True)
class CodebookUsage:
    """counts: how often each entry was used for some set of images, int [V]."""

    name: str
    counts: NDArray[np.int64]

    @property
    def used_share(self) -> float:
        """Return the share of entries, 0 to 1, that were used at all."""
        return float((self.counts > 0).mean())

    @property
    def perplexity(self) -> float:
        """Return how many equally used entries would carry as much information: 1 to V."""
        shares = self.counts[self.counts > 0] / max(1, self.counts.sum())
        return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True, kw_only=True)
class Reconstructions:
    """Images, and the same after dVAE encoding and decoding, uint8 [H, W, 3] each."""

    originals: Sequence[Pixels]
    reconstructions: Sequence[Pixels]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One caption's images, uint8 [H, W, 3], best first, with the score of each.

    actual: the caption's real image, if there is one.
    nearest, nearest_caption: the training picture that is nearest to the best image, and its
        caption, if known.
    is_right: whether each image counts as the caption's own (see caption accuracy), if known.
    """

    caption: str
    images: Sequence[Pixels]
    scores: Sequence[float]
    actual: Pixels | None = None
    is_right: Sequence[bool] | None = None
    nearest: Pixels | None = None
    nearest_caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """CLIP: how often a caption's nearest image, of num_pairs, is its own. top1: 0 to 1."""

    top1: float
    num_pairs: int


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """How often a caption's generated image is rather the training picture of another one.

    share: 0 to 1, of num_captions images, one each, that are nearer to such a picture than to
    their own real one. num_pictures: training pictures that were compared.
    """

    share: float
    num_captions: int
    num_pictures: int


@dataclass(frozen=True, kw_only=True)
class CaptionAccuracy:
    """Caption accuracy over one set of captions; all shares 0 to 1.

    scope: which captions, such as `all held-out captions`.
    overall: method (`greedy`, `single sample`, `best of 32`) -> share that is right as a whole.
    per_attribute: attribute (`colour`) -> method -> share in which that attribute is right.
    """

    scope: str
    num_captions: int
    overall: Mapping[str, float]
    per_attribute: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def standard_error(self) -> float:
        """Return that of the first method's share."""
        share = next(iter(self.overall.values()))
        return math.sqrt(share * (1 - share) / max(1, self.num_captions))


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """The content of one channel. skipped: reason -> count. examples: reason -> a few names."""

    channel: str
    num_pairs: int
    num_captions: int
    image_size: int
    fingerprint: str
    skipped: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset, whole: Totals | None = None) -> DatasetSummary:
        """Summarise a data set as it stands; images that fail later are not counted.

        whole: of all hosts' parts, when the data set is one of them.
        """
        whole = whole or Totals.of(dataset)
        return cls(
            channel=dataset.channel,
            num_pairs=whole.num_pairs,
            num_captions=whole.num_captions,
            image_size=dataset.image_size,
            fingerprint=whole.fingerprint,
            skipped=dataset.skips.as_dict(),
            examples={reason.value: names for reason, names in dataset.skips.examples.items()},
        )

    @property
    def num_bad(self) -> int:
        """Return how many would-be pairs could not be used."""
        return sum(self.skipped.values()) - self.skipped.get(SkipReason.IGNORED.value, 0)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of a report; whatever is empty or None is left out.

    generated_at: with a time zone. stages: the runs that trained, as the manifest records them.
    curves: `stage/metric` -> (step, value) pairs, as `read_curves` gives them; `x` and
        `validation_x` of a stage share one chart.
    ranked_by: what the scores of `generated` are: `clip` or `log_likelihood`.
    sampling: how the settings of `generated` were chosen; None where they were not.
    notes: paragraphs for the top, such as which pairs were skipped and why.
    """

    title: str
    generated_at: datetime
    notes: Sequence[str] = ()
    stages: Sequence[StageRecord] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    codebooks: Sequence[CodebookUsage] = ()
    reconstructions: Reconstructions | None = None
    generated: Sequence[Generated] = ()
    ranked_by: str = "clip"
    sampling: ChosenSampling | None = None
    accuracy: Sequence[CaptionAccuracy] = ()
    retrieval: Retrieval | None = None
    memorisation: Memorisation | None = None
    datasets: Sequence[DatasetSummary] = ()
    hyperparameters: Mapping[str, object] = field(default_factory=dict)


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read metrics.jsonl back: `stage/metric` -> (step, value) pairs by ascending step.

    A line is a JSON object with `stage`, `step` and numbers by name. A resumed job writes some
    steps again: the later line counts. Other lines (a killed job leaves half a line) are skipped
    and their number is logged. A missing file gives no curves.
    """
    values: dict[str, dict[int, float]] = {}
    num_bad = 0
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            stage, step = str(record["stage"]), int(record["step"])
        except (ValueError, TypeError, KeyError):
            num_bad += 1
            continue
        for name, value in record.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            values.setdefault(f"{stage}/{name.removeprefix(f'{stage}_')}", {})[step] = float(value)
    if num_bad:
        log.warning("%s: %d lines are no metrics and were skipped", path, num_bad)
    return {key: sorted(points.items()) for key, points in values.items()}
