"""Model card of an artefact: what it was made of, how large it is, how well it does.

    Manifest and models -> ModelCard -> MODEL_CARD.md

The Markdown has the YAML front matter that model hubs read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from dalle.manifest import ImportedModel, Manifest, StageRecord
from dalle.types import ImageTokenizerKind, StageName
from dalle.versions import OURS

if TYPE_CHECKING:
    from torch import nn

MODEL_CARD = "MODEL_CARD.md"

NUM_CANDIDATES = 16
"""Of a request that does not say."""

_WORDS: Mapping[StageName, str] = {
    "dvae": "discrete VAE: image to image tokens and back",
    "transformer": "autoregressive transformer: caption to image tokens",
    "clip": "CLIP: score of image and caption",
}
_PUBLISHED: Mapping[ImageTokenizerKind, str] = {
    "dalle_pytorch": "DALLE-pytorch's VAE, not trained here: image to image tokens and back",
    "openai": "OpenAI's discrete VAE, not trained here: image to image tokens and back",
    "vqgan": "VQGAN, not trained here: image to image tokens and back",
}
"""In place of the words of the stage dvae."""
_LEGACY = "DALLE-pytorch's autoregressive transformer: caption to image tokens"
"""In place of the words of the stage transformer."""
_SIZES = (
    "image_size",
    "grid_size",
    "codebook_size",
    "num_codebooks",
    "text_vocab_size",
    "text_length",
    "width",
    "num_layers",
    "embed_size",
)
# Names that hubs know; any other licence is `other`, with its text as the name.
_LICENCES = frozenset(
    {
        "apache-2.0",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "gpl-3.0",
        "mit",
        "openrail",
        "unknown",
    }
)


class ComponentCard(BaseModel):
    """One model of an artefact, and the last training that it had."""

    model_config = ConfigDict(frozen=True)

    name: StageName
    description: str
    parameters: int
    """Number of weights."""
    sizes: dict[str, int]
    """Of its config."""
    steps: int | None = None
    """None where the artefact has no record of a training."""
    minutes: float | None = None
    finished_at: str = ""
    """ISO 8601, UTC."""
    is_finished: bool = True
    metrics: dict[str, float] = {}
    """Of the last validation."""
    pairs: dict[str, int] = {}
    """Number of pairs by channel."""
    dataset_fingerprint: str = ""
    trained_on_from: list[str] = []
    """The trainings that came before, the newest first, in words."""


class ModelCard(BaseModel):
    """What people should know of a model before they use it."""

    model_config = ConfigDict(frozen=True)

    licence: str
    library_version: str
    git_revision: str
    captions: list[str]
    """A few captions of the data."""
    image_size: int | None
    """Side of generated images in pixels; None for an artefact that generates none."""
    grid_size: int | None
    """Side of the image-token grid."""
    guidance: bool
    """Whether captions were dropped in training, which a guidance_scale above 1 needs."""
    sampling_defaults: dict[str, Any]
    """Of a request that names none of them."""
    sampling_captions: int | None = None
    """Held-out captions that they were chosen on; None where they are those of every model."""
    components: list[ComponentCard]


def describe(manifest: Manifest, models: Mapping[StageName, nn.Module]) -> ModelCard:
    """Return the card of an artefact with this manifest and these models."""
    records = manifest.newest_records()
    components = [
        _component(name, model, manifest.lineage(name), manifest.imported.get(name))
        for name, model in models.items()
    ]
    sizes = {each.name: each.sizes for each in components}
    record = records.get("transformer")
    generates = {"dvae", "transformer"} <= sizes.keys()
    return ModelCard(
        licence=manifest.licence,
        library_version=manifest.library_version,
        git_revision=manifest.git_revision,
        captions=manifest.captions,
        image_size=sizes["dvae"]["image_size"] if generates else None,
        grid_size=sizes["transformer"]["grid_size"] if generates else None,
        guidance=bool(record and record.hyperparameters.get("caption_dropout"))
        or getattr(getattr(models.get("transformer"), "config", None), "caption_dropout", 0) > 0,
        sampling_defaults={
            "num_candidates": NUM_CANDIDATES,
            **manifest.sampling_settings.model_dump(),
        },
        sampling_captions=None if manifest.sampling is None else manifest.sampling.num_captions,
        components=components,
    )


def _component(
    name: StageName,
    model: nn.Module,
    lineage: Sequence[StageRecord],
    imported: ImportedModel | None,
) -> ComponentCard:
    record = lineage[0] if lineage else None
    config = model.config
    values = {each: getattr(config, each, None) for each in _SIZES}
    sizes = {each: value for each, value in values.items() if isinstance(value, int)}
    description = _describe(name, getattr(config, "kind", None))
    if imported is not None:
        description = f"{imported.what}; {'not trained here' if record is None else 'trained on'}"
    card = ComponentCard(
        name=name,
        description=description,
        parameters=sum(each.numel() for each in model.parameters()),
        sizes=sizes,
    )
    if record is None:
        return card
    trained = {
        "steps": record.steps,
        "minutes": round(record.wall_seconds / 60, 1),
        "finished_at": record.finished_at,
        "is_finished": record.is_finished,
        "metrics": record.metrics,
        "pairs": record.dataset_counts,
        "dataset_fingerprint": record.dataset_fingerprint,
        "trained_on_from": [
            f"job {each.job_name}, {each.steps:,} steps until {each.finished_at}"
            for each in lineage[1:]
        ],
    }
    return card.model_copy(update=trained)


def _describe(name: StageName, kind: Any) -> str:
    if name == "transformer" and kind is not None:
        return _LEGACY
    return _PUBLISHED.get(kind, _WORDS[name])


def render(card: ModelCard) -> str:
    """Return MODEL_CARD.md."""
    lines = ["---", *_front_matter(card), "---", "", "# Model card", "", *_introduction(card)]
    lines += ["", "## Training data", "", *_data(card)]
    lines += ["", "## Models", "", *_models(card)]
    lines += ["", "## Evaluation", "", *_evaluation(card)]
    lines += ["", "## Sampling", "", *_sampling(card)]
    lines += ["", "## Limits", "", *_limits(card)]
    return "\n".join(lines) + "\n"


def _front_matter(card: ModelCard) -> Iterator[str]:
    """Yield YAML; every value is JSON, which is YAML too."""
    licence = card.licence.strip()
    if not licence or licence.lower() in _LICENCES:
        yield f"license: {licence.lower() or 'unknown'}"
    else:
        yield "license: other"
        yield f"license_name: {_json(licence)}"
    yield f"library_name: {OURS}"
    if card.image_size is not None:
        yield "pipeline_tag: text-to-image"
    yield f"tags: {_json(['dall-e', *(each.name for each in card.components)])}"
    if card.captions:
        yield f"widget: {_json([{'text': caption} for caption in card.captions])}"
    results = [
        {
            "task": {"type": "text-to-image"},
            "dataset": {"name": f"held-out pairs ({each.name})", "type": "image-text"},
            "metrics": [{"type": name, "value": value} for name, value in each.metrics.items()],
        }
        for each in card.components
        if each.metrics
    ]
    if results:
        yield f"model-index: {_json([{'name': OURS, 'results': results}])}"


def _introduction(card: ModelCard) -> Iterator[str]:
    if card.image_size is None:
        yield "Parts of a text-to-image model. They generate no images without the missing ones."
    else:
        has_clip = any(each.name == "clip" for each in card.components)
        yield (
            f"Generates images of {card.image_size} x {card.image_size} pixels for a caption, as "
            "DALL-E does: a transformer samples image tokens, a discrete VAE decodes them, and "
            f"{'a CLIP ranks the candidates' if has_clip else 'the likeliest come first'}."
        )
    version = f" {card.library_version}" if card.library_version else ""
    revision = f", revision {card.git_revision}" if card.git_revision else ""
    yield ""
    yield f"Made by {OURS}{version}{revision}. Licence: {card.licence or 'not given'}."
    if card.captions:
        yield ""
        yield "Captions to try:"
        yield ""
        yield from (f"- {' '.join(caption.split())}" for caption in card.captions)


def _data(card: ModelCard) -> Iterator[str]:
    trained = [each for each in card.components if each.pairs]
    if not trained:
        yield "Not recorded."
        return
    yield "| model | pairs | fingerprint of the data |"
    yield "|---|---|---|"
    for each in trained:
        pairs = ", ".join(f"{channel} {number:,}" for channel, number in each.pairs.items())
        yield f"| {each.name} | {pairs} | `{each.dataset_fingerprint[:16]}` |"


def _models(card: ModelCard) -> Iterator[str]:
    yield "| model | weights | sizes | training |"
    yield "|---|---|---|---|"
    for each in card.components:
        sizes = ", ".join(f"{name} {value:,}" for name, value in each.sizes.items())
        training = "not recorded"
        if each.steps is not None:
            training = f"{each.steps:,} steps, {each.minutes:g} minutes, until {each.finished_at}"
            if not each.is_finished:
                training += ", stopped before its end"
            training += "".join(f"; trained on from {before}" for before in each.trained_on_from)
        yield f"| {each.description} | {each.parameters:,} | {sizes} | {training} |"


def _evaluation(card: ModelCard) -> Iterator[str]:
    measured = [(each.name, *pair) for each in card.components for pair in each.metrics.items()]
    if not measured:
        yield "Not measured: the job had no held-out pairs."
        return
    yield "On held-out pairs, at the end of training:"
    yield ""
    yield "| model | metric | value |"
    yield "|---|---|---|"
    yield from (f"| {name} | {metric} | {value:.4g} |" for name, metric, value in measured)


def _sampling(card: ModelCard) -> Iterator[str]:
    yield "Defaults of a request:"
    yield ""
    yield "| setting | default |"
    yield "|---|---|"
    for name, value in card.sampling_defaults.items():
        yield f"| {name} | {'off' if value is None else f'{value:g}'} |"
    yield ""
    if card.sampling_captions is not None:
        yield f"Chosen on {card.sampling_captions} held-out captions. A request's own values win."
        yield ""
    if card.guidance:
        yield "Captions were dropped in training, so a guidance_scale above 1 may help."
    else:
        yield "No captions were dropped in training: leave guidance_scale at 1."


def _limits(card: ModelCard) -> Iterator[str]:
    yield "The model knows what its training data show, and no more."
    for each in card.components:
        if each.name == "transformer":
            yield f"It reads at most {each.sizes['text_length']:,} text tokens of a caption."


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
