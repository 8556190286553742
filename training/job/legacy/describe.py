"""What a file of DALLE-pytorch's is, and what it takes to serve it: `training.legacy inspect`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.job.legacy.config.choices import Choices, NotToldError
from training.job.legacy.config.resolve import Outline, outline, resolve
from training.job.legacy.config.wrapping import Wrapping, wrapping_of
from training.job.legacy.importer import read_model
from training.job.legacy.saved.names import split_layers
from training.job.legacy.saved.relatives import Relative
from training.job.legacy.saved.saved_model import RelativeError, SavedModel
from training.job.legacy.tokenizer import CLIP_VOCABULARY, ends_captions, needed_tokenizer
from training.job.legacy.vae import is_normalised, not_finite_in_vae, vae_kind
from training.job.pretrained.weights_file import missing_words

_KINDS = {
    "train_dalle": "checkpoint of train_dalle.py",
    "deepspeed": "DeepSpeed folder of train_dalle.py",
    "kobiso": "release of kobiso's DALLE-reproduction",
    "bare": "bare weights, as early versions saved them",
}
_PRETRAINED = {
    "OpenAIDiscreteVAE": "OpenAI's dVAE, in the file",
    "VQGanVAE": "VQGAN of taming-transformers, in the file",
    "DiscreteVAE": "DALLE-pytorch's own, in the file",
    None: "not in the file",
}


@dataclass(frozen=True)
class Description:
    """What a file is."""

    file: str
    kind: str
    versions: str = "unknown"
    """Of DALLE-pytorch, first and last that can have written it."""
    sizes: dict[str, int] = field(default_factory=dict)
    attention: list[str] | None = None
    """The package's name of each layer's attention; None where the file does not tell."""
    behaviours: list[str] | None = None
    """None where they are not known."""
    vae: str = "unknown"
    tokenizer: str = "unknown"
    missing: list[str] = field(default_factory=list)
    """What `import` needs beside the file."""
    notes: list[str] = field(default_factory=list)
    refused: str | None = None
    """Why it cannot be imported at all."""

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)

    def as_text(self) -> str:
        """Return lines for people."""
        rows: list[tuple[str, str]] = [
            ("file", self.file),
            ("kind", self.kind),
            ("DALLE-pytorch", self.versions),
            *((name.replace("_", " "), f"{value:,}") for name, value in self.sizes.items()),
            ("attention", "not told" if self.attention is None else ", ".join(self.attention)),
            ("also", _listed(self.behaviours)),
            ("VAE", self.vae),
            ("tokenizer", self.tokenizer),
            *(("missing", each) for each in self.missing),
            *(("note", each) for each in self.notes),
        ]
        if self.refused is not None:
            rows = [row for row in rows if row[1] != "unknown"] + [("refused", self.refused)]
        return "\n".join(f"{name:<16}  {value}" for name, value in rows)


def _listed(behaviours: list[str] | None) -> str:
    return "unknown" if behaviours is None else ", ".join(behaviours) or "nothing"


def describe(path: Path, choices: Choices) -> Description:
    """Describe a file or folder. Raises ForeignFileError for one that holds no such model."""
    try:
        return describe_saved(path.name, read_model(path), choices)
    except RelativeError as error:
        return _described(path, error.relative)


def describe_saved(name: str, saved: SavedModel, choices: Choices) -> Description:
    """Describe what a file or folder of a name holds."""
    kind = _KINDS[saved.kind]
    try:
        found = outline(saved, choices)
    except NotToldError as error:
        behaviours = _of_wrapping(wrapping_of(saved, split_layers(saved.weights)))
        return Description(name, kind, behaviours=behaviours or None, missing=[str(error)])
    except (ValueError, LookupError) as error:
        return Description(name, kind, refused=_words(error))
    told = Description(
        name,
        kind,
        str(found.versions),
        _sizes(found),
        None if found.their_kinds is None else list(found.their_kinds),
        _behaviours(saved, found, choices),
        _PRETRAINED[vae_kind(saved)],
        needed_tokenizer(found.text_vocab_size, is_kobiso=saved.kind == "kobiso"),
        _missing(saved, found),
        _notes(saved, found, choices),
    )
    checks: list[Callable[[], object]] = [
        lambda: resolve(saved, choices),
        lambda: is_normalised(saved, found.versions),
    ]
    if found.text_vocab_size == CLIP_VOCABULARY:
        checks.append(lambda: ends_captions(found.versions))
    for check in checks:
        try:
            check()
        except NotToldError as error:
            told.missing.append(str(error))
        except (ValueError, LookupError) as error:
            return Description(**{**vars(told), "refused": _words(error)})
    return told


def _described(path: Path, relative: Relative) -> Description:
    """Describe another model of the family."""
    return Description(
        path.name,
        relative.kind,
        "it is of another package",
        dict(relative.sizes),
        list(relative.attention),
        vae=relative.vae,
        tokenizer=relative.tokenizer,
        missing=list(relative.missing),
        notes=list(relative.notes),
        refused=f"it is not imported: {relative.why}",
    )


def _words(error: Exception) -> str:
    return missing_words(error) if isinstance(error, LookupError) else str(error)


def _sizes(found: Outline) -> dict[str, int]:
    return {
        "width": found.width,
        "layers": found.num_layers,
        "heads": found.num_heads,
        "head_width": found.head_width,
        "text_vocabulary": found.text_vocab_size,
        "text_length": found.text_length,
        "grid_size": found.grid_size,
        "image_codes": found.codebook_size,
    }


def _behaviours(saved: SavedModel, found: Outline, choices: Choices) -> list[str]:
    stable = saved.hyperparameters.get("stable") is True or choices.is_stable is True
    hidden = not found.padding_by_position and choices.hides_padding is not False
    return [
        *_of_wrapping(found.wrapping),
        *(
            words
            for words, is_there in (
                ("stable", stable),
                ("a padding id for each position", found.padding_by_position),
                ("padding hidden from attention", hidden),
            )
            if is_there
        ),
    ]


def _of_wrapping(wrapping: Wrapping) -> list[str]:
    return [
        words
        for words, is_there in (
            ("reversible", wrapping.reversible),
            ("token shift", wrapping.token_shift),
            ("rotary positions", bool(wrapping.rotary_width)),
            ("sandwich norm", wrapping.sandwich_norm),
            (f"{wrapping.norm} norm", wrapping.norm != "layer"),
        )
        if is_there
    ]


def _missing(saved: SavedModel, found: Outline) -> list[str]:
    missing = []
    if found.text_vocab_size != CLIP_VOCABULARY:
        is_kobiso = saved.kind == "kobiso"
        missing.append(needed_tokenizer(found.text_vocab_size, is_kobiso=is_kobiso))
    wanted = f"the VAE with {found.codebook_size:,} codes that it was trained on (--vae FOLDER)"
    if vae_kind(saved) is None:
        missing.append(wanted)
    elif name := not_finite_in_vae(saved):
        missing.append(f"{wanted}: in the file, {name} has values that are not finite")
    return missing


def _notes(saved: SavedModel, found: Outline, choices: Choices) -> list[str]:
    notes = []
    if not found.heads_are_told:
        notes.append(
            f"the file does not tell its attention heads: taken are {found.num_heads} of "
            f"{found.head_width} channels, the package's default; --heads says another number"
        )
    if saved.kind == "kobiso" or (found.their_kinds and "sparse" in found.their_kinds):
        notes.append("DeepSpeed is not needed, whatever the model's page says")
    told = "stable" in saved.hyperparameters or choices.is_stable is not None
    if not told and not found.versions.is_before("0.12.1"):
        notes.append("the file does not tell whether it was trained with --stable")
    if not found.padding_by_position:
        notes.append(
            "no file tells whether padding was hidden from attention; train_dalle.py did hide it"
        )
    return notes
