"""The kind of attention of each layer, and which kinds of which versions cannot be served."""

from __future__ import annotations

from collections.abc import Sequence

from dalle.models.legacy.config import LegacyAttentionKind
from training.job.legacy.config.choices import THEIR_KINDS, Choices, NotToldError
from training.job.legacy.config.versions import VersionRange
from training.job.legacy.saved.names import Layers
from training.job.legacy.saved.saved_model import SavedModel


def their_kinds_of(saved: SavedModel, layers: Layers, choices: Choices) -> tuple[str, ...] | None:
    """Return the package's attention kind of each layer; None where it is not known."""
    num_layers = len(layers.branches)
    told: Sequence[object] | None = None
    value = saved.hyperparameters.get("attn_types")
    if isinstance(value, str):
        told = tuple(each.strip() for each in value.split(","))
    elif isinstance(value, tuple):
        told = value
    chosen = choices.attention_kinds
    if told and chosen and _repeated(told, num_layers) != _repeated(chosen, num_layers):
        raise ValueError(
            f"the file says attn_types {','.join(map(str, told))[:200]}, and --attn-types is "
            f"{','.join(chosen)[:200]}; leave the option out"
        )
    told = told or chosen
    if told is None and saved.hyperparameters:
        told = ("full",)  # what the class does where it is not told
    is_sparse = ["layout" in attention.weights for attention, _ in layers.branches]
    if told is None:
        return ("sparse",) * num_layers if all(is_sparse) else None
    kinds = _repeated(told, num_layers)
    for layer, kind in enumerate(kinds):
        if kind == "mlp":
            raise ValueError("attn_types has mlp, a gMLP, which is not supported")
        if kind not in THEIR_KINDS:
            raise ValueError(f"attn_types must be of {', '.join(THEIR_KINDS)}, got {kind[:40]!r}")
        if (kind == "sparse") != is_sparse[layer]:
            has = "has" if is_sparse[layer] else "lacks"
            raise ValueError(
                f"attn_types says {kind} for layer {layer}, which {has} the layout "
                "attn_fn.master_layout of sparse attention"
            )
    return kinds


def _repeated(kinds: Sequence[object], num_layers: int) -> tuple[str, ...]:
    """Return the kind of each layer; none for an empty list."""
    return tuple(str(kinds[layer % len(kinds)]) for layer in range(num_layers)) if kinds else ()


def refuse_looking_ahead(kinds: Sequence[str], versions: VersionRange) -> None:
    """Raise ValueError where a layer sees tokens that are not sampled yet."""
    is_axial = any(kind.startswith("axial") for kind in kinds)
    for kinds_of, fixed, is_there in (
        ("axial", "0.2.8", is_axial),
        ("conv_like", "0.3.5", "conv_like" in kinds),
    ):
        if not is_there or not versions.may_be_before(fixed):
            continue
        if versions.is_before(fixed):
            raise ValueError(
                f"{kinds_of} attention before DALLE-pytorch {fixed} sees tokens that come after "
                "its own, which are not there when an image is sampled: such a model cannot be "
                "served"
            )
        raise NotToldError(
            f"the file does not tell whether its {kinds_of} attention is that before DALLE-pytorch "
            f"{fixed}, which sees tokens after its own: say the version that trained it by "
            "--dalle-pytorch-version"
        )


def our_kind(kind: str, versions: VersionRange) -> LegacyAttentionKind:
    match kind:
        case "full" | "axial_row" | "axial_col" | "sparse":
            return kind
    if versions.is_before("1.5.0"):
        return "conv_centred"
    if not versions.may_be_before("1.5.0"):
        return "conv_up_left"
    raise NotToldError(
        "the file does not tell whether its conv_like attention is that of DALLE-pytorch 1.5.0 and "
        "later, which sees other tokens than before: say the version that trained it by "
        "--dalle-pytorch-version"
    )
