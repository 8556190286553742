"""Sampling settings of a trained model, chosen on held-out captions by CLIP and likelihood.

    settings -> draws -> CLIP: is each image nearest to its own caption, of all captions?
             -> logits of the held-out images' codes -> nats a code

CLIP says how well the draws show their captions, and the likelihood which settings are still the
model's distribution and not a few images of it. `best_of` has the rule. Letters: C captions,
K draws of each, N positions, M codes of a position, V codebook size, E embedding.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingOptions, filtered, token_log_p
from dalle.manifest import ChosenSampling, SamplingSettings, TriedSampling
from dalle.models.transformer import PADDING
from training.data.batching.preload import float_chunks
from training.report.samples import generate_candidates
from training.stopping import NEVER, Stop, Stopped

logger = logging.getLogger(__name__)

PLAIN = SamplingSettings()
FILTERS = (
    SamplingSettings(temperature=0.85),
    SamplingSettings(temperature=0.7),
    SamplingSettings(temperature=0.5),
    SamplingSettings(top_p=0.9),
)
GUIDED = (
    SamplingSettings(guidance_scale=1.5),
    SamplingSettings(guidance_scale=2.5),
    SamplingSettings(guidance_scale=1.5, temperature=0.85),
)
"""Where captions were dropped in training."""
DRAWS = 2
FEWEST_CAPTIONS, MOST_CAPTIONS = 32, 256
MOST_LOST_NATS = 0.15
"""That a code of the held-out images may lose, in the mean."""
MODEL_SHARE = 0.1
"""Of the model in the mixture that codes are measured by: a code that a filter leaves out costs
2.3 nats more than by the model, and not infinitely many."""
FIRST_CAPTIONS = 16
"""Captions whose draws tell how long the others take."""
MOST_LOGITS = 50_000_000
"""Of the held-out images together, in the likelihood of one of the settings."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Draws by some settings. hits: [C], the share of a caption's draws that are its own."""

    settings: SamplingSettings
    hits: Tensor
    nats: float
    spread: float

    def record(self) -> TriedSampling:
        """Return what the manifest tells."""
        return TriedSampling(
            settings=self.settings,
            own_caption=float(self.hits.mean()),
            nats=self.nats,
            spread=self.spread,
        )


def best_of(trials: Sequence[Trial], plain: Trial, real: float) -> Trial:
    """Return the trial to use instead of `plain`, or `plain`.

    real: share of the real images that CLIP finds nearest to their caption. Draws above that, and
    above the plain ones, earn nothing more: they please CLIP. A trial counts when its codes lose
    at most `MOST_LOST_NATS`, and when it beats the plain one by two standard errors of the
    difference, caption by caption. Of those within two standard errors of the best it is the one
    whose nats are the fewest: few captions cannot tell them apart, and it alters the model least.
    """
    limit = max(real, float(plain.hits.mean()))

    def earned(trial: Trial) -> float:
        return min(float(trial.hits.mean()), limit)

    better = []
    for each in trials:
        mean, error = _difference(each, plain)
        if each.nats <= plain.nats + MOST_LOST_NATS and mean > 2 * error:
            better.append(each)
    if not better:
        return plain
    best = max(better, key=earned)
    equal = [
        each for each in better if earned(best) - earned(each) <= 2 * _difference(best, each)[1]
    ]
    return min(equal, key=lambda each: each.nats)


def _difference(one: Trial, other: Trial) -> tuple[float, float]:
    """Return mean and standard error of the difference of two trials over the captions."""
    off = one.hits - other.hits
    return float(off.mean()), float(off.std()) / math.sqrt(len(off))


def choose_sampling(
    artefact: Artefact,
    captions: Sequence[str],
    images: Tensor,
    *,
    guidance: bool,
    seconds: float,
    seed: int = 0,
    stop: Stop = NEVER,
    clock: Callable[[], float] = time.monotonic,
) -> ChosenSampling | None:
    """Choose the settings that `serve` samples with where a request is silent.

    captions, images uint8 [C, 3, S, S]: held-out pairs. guidance: whether captions were dropped in
    training. seconds: the choice takes about as long, on fewer captions where it must, and at most
    twice as long. None, and why is logged, for fewer than `FEWEST_CAPTIONS` different captions, or
    without the time for so many. Raises ArtefactError without a CLIP; Stopped.
    """
    late = _Late(stop, clock, clock() + 2 * seconds)
    chooser = _Chooser(artefact, captions, images, seed, late)
    if len(chooser.captions) < FEWEST_CAPTIONS:
        logger.info(
            "sampling: temperature 1; it takes %d different held-out captions to choose another, "
            "and there are %d",
            FEWEST_CAPTIONS,
            len(chooser.captions),
        )
        return None
    began = clock()
    try:
        chooser.draw(PLAIN, FIRST_CAPTIONS)
        # Guidance doubles the work of its draws.
        num_trials = 1 + len(FILTERS) + (2 * len(GUIDED) if guidance else 0)
        affordable = int(seconds * FIRST_CAPTIONS / max(clock() - began, 1e-9) / num_trials)
        if affordable >= FEWEST_CAPTIONS:
            chooser.keep(min(affordable, MOST_CAPTIONS))
            return chooser.choose(guidance)
    except Stopped:
        if stop.is_set():
            raise
    logger.info(
        "sampling: temperature 1; %.0f seconds are too few to choose another on %d captions",
        seconds,
        FEWEST_CAPTIONS,
    )
    return None


class _Late(Stop):
    """Set with another stop, or from a time on."""

    def __init__(self, stop: Stop, clock: Callable[[], float], end: float) -> None:
        super().__init__()
        self._stop, self._clock, self._end = stop, clock, end

    def is_set(self) -> bool:
        return self._stop.is_set() or self._clock() > self._end


class _Chooser:
    def __init__(
        self, artefact: Artefact, captions: Sequence[str], images: Tensor, seed: int, stop: Stop
    ) -> None:
        self._artefact, self._seed, self._stop = artefact, seed, stop
        self._clip = artefact.require("clip", "choosing sampling settings")
        self._device = self._clip.mean.device
        rows = list({caption: row for row, caption in reversed([*enumerate(captions)])}.values())
        rows.sort()
        self.captions = [captions[row] for row in rows]
        self._images = images[rows]

    def keep(self, number: int) -> None:
        """Keep so many captions, evenly over all of them."""
        every = [row * len(self.captions) // number for row in range(number)]
        rows = sorted({*every}) if number < len(self.captions) else range(len(self.captions))
        self.captions = [self.captions[row] for row in rows]
        self._images = self._images[[*rows]]

    @torch.inference_mode()
    def choose(self, guidance: bool) -> ChosenSampling:
        clip, tokenizer = self._clip, self._artefact.tokenizer
        self._texts = clip.encode_captions(self.captions, tokenizer)  # [C, E]
        # Captions that CLIP cannot tell apart, for want of words that it knows, are one.
        self._same = self._texts @ self._texts.T > 1 - 1e-5
        chunks = [
            clip.encode_generated(chunk)
            for chunk in float_chunks(self._images, self._device, self._stop)
        ]
        real = float(self._hits(torch.cat(chunks)[:, None]).mean())
        plain = self._try([PLAIN])[0]
        trials = self._try((*FILTERS, *GUIDED) if guidance else FILTERS, plain)
        chosen = best_of(trials, plain, real)
        logger.info(
            "sampling: %s, chosen on %d held-out captions: CLIP finds %.1f %% of the images "
            "nearest to their own caption, %.1f %% at temperature 1, and %.1f %% of the real ones",
            chosen.settings,
            len(self.captions),
            100 * chosen.hits.mean(),
            100 * plain.hits.mean(),
            100 * real,
        )
        return ChosenSampling(
            settings=chosen.settings,
            num_captions=len(self.captions),
            own_caption_of_real=real,
            tried=[each.record() for each in (plain, *trials)],
        )

    def _try(self, settings: Sequence[SamplingSettings], plain: Trial | None = None) -> list[Trial]:
        """Draw by the settings whose codes lose few enough nats against the plain ones."""
        trials = []
        for each, nats in zip(settings, self._nats(settings), strict=True):
            if plain is not None and nats > plain.nats + MOST_LOST_NATS:
                continue
            vectors = self.draw(each, len(self.captions))
            spread = 1 - (vectors[:, 0] * vectors[:, 1]).sum(dim=-1).mean()
            trials.append(Trial(each, self._hits(vectors), nats, max(0.0, float(spread))))
        return trials

    def draw(self, settings: SamplingSettings, number: int) -> Tensor:
        """Return CLIP's vectors [C, K, E] of draws of the first captions. Raises Stopped.

        The noise is the same for all settings, so that they differ in little else.
        """
        candidates = generate_candidates(
            self._artefact,
            self.captions[:number],
            [range(DRAWS)] * number,
            seed=self._seed,
            options=SamplingOptions(**dict(settings)),
            stop=self._stop,
        )
        images = torch.cat([each.images for each in candidates])
        with torch.inference_mode():
            chunks = [
                self._clip.encode_generated(chunk)
                for chunk in float_chunks(images, self._device, self._stop)
            ]
        return torch.cat(chunks).view(number, DRAWS, -1)

    def _hits(self, vectors: Tensor) -> Tensor:
        """Return the share [C] of each caption's images, of vectors [C, K, E], that are its own."""
        nearest = (vectors @ self._texts.T).argmax(dim=-1)  # [C, K]
        return self._same.gather(1, nearest).double().mean(dim=1).cpu()

    def _nats(self, settings: Sequence[SamplingSettings]) -> list[float]:
        """Return the nats of a code of the held-out images under each of the settings."""
        transformer = self._artefact.require("transformer")
        dvae, config = self._artefact.require("dvae"), transformer.config
        per_image = config.num_positions * config.num_codebooks * config.codebook_size
        number = max(1, min(len(self.captions), MOST_LOGITS // per_image))
        texts = self._artefact.require("tokenizer").encode(self.captions[:number])
        sums, count, done = torch.zeros(len(settings), dtype=torch.float64), 0, 0
        is_guided = any(each.guidance_scale != 1 for each in settings)
        for images in float_chunks(self._images[:number], self._device, self._stop):
            for part in torch.split(images, max(1, MOST_LOGITS // 16 // per_image)):
                codes = dvae.encode(part)
                text = texts[done : done + len(part)].to(self._device)
                done += len(part)
                logits = transformer.image_logits(text, codes)
                blank = transformer.image_logits(torch.full_like(text, PADDING), codes)
                for m, own in enumerate(logits):
                    without = next(blank) if is_guided else own
                    sums += self._lost(own, without, codes[..., m], settings).cpu()
                    count += codes[..., m].numel()
                if self._stop.is_set():
                    raise Stopped
        return (sums / count).tolist()

    def _lost(
        self, logits: Tensor, blank: Tensor, codes: Tensor, settings: Sequence[SamplingSettings]
    ) -> Tensor:
        """Return the nats of codes [B, N], added up, under each of the settings."""
        logits, blank = logits.flatten(0, 1).float(), blank.flatten(0, 1).float()  # [B * N, V]
        tokens = codes.flatten()
        own = token_log_p(logits, tokens) + math.log(MODEL_SHARE)
        sums = []
        for each in settings:
            guided = blank + each.guidance_scale * (logits - blank)
            log_p = token_log_p(filtered(guided, SamplingOptions(**dict(each))), tokens)
            mixed = torch.logaddexp(log_p + math.log(1 - MODEL_SHARE), own)
            sums.append(-mixed.double().sum())
        return torch.stack(sums)
