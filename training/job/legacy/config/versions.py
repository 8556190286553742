"""Which versions of DALLE-pytorch can have written a file, and what they did."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from training.job.legacy.config.positions import axial_positions
from training.job.legacy.saved.names import Layers
from training.job.legacy.saved.saved_model import SavedModel
from training.job.pretrained.weights_file import shape_of

FIRST, LAST = "0.1.19", "1.6.6"


@dataclass(frozen=True)
class VersionRange:
    """From the first to the last version, both included."""

    first: str = FIRST
    last: str = LAST

    def within(self, first: str = FIRST, last: str = LAST) -> VersionRange:
        """Return the part of the range that is in another one. Raises ValueError for none."""
        narrowed = VersionRange(
            max(self.first, first, key=parse_version), min(self.last, last, key=parse_version)
        )
        if parse_version(narrowed.first) > parse_version(narrowed.last):
            raise ValueError(
                f"version {self} of DALLE-pytorch, and weights of version "
                f"{VersionRange(first, last)}, contradict each other"
            )
        return narrowed

    def narrowed(self, first: str = FIRST, last: str = LAST) -> VersionRange:
        """Return the part of the range that is in another one; the whole range for none.

        For signs that a fork, or a commit between two versions, may have too.
        """
        try:
            return self.within(first, last)
        except ValueError:
            return self

    def is_before(self, version: str) -> bool:
        """Whether every version of the range is before one."""
        return parse_version(self.last) < parse_version(version)

    def may_be_before(self, version: str) -> bool:
        """Whether some version of the range is before one."""
        return parse_version(self.first) < parse_version(version)

    def is_within(self, first: str, last: str) -> bool | None:
        """Whether the range's versions are in another range; None where some are and some not."""
        try:
            return self.within(first, last) == self or None
        except ValueError:
            return False

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


def parse_version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version. Raises ValueError for a text that is none."""
    if not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", text):
        raise ValueError(f"version must be numbers as in 1.6.6, got {text[:40]!r}")
    return tuple(int(part) for part in text.split("."))


def versions_of(saved: SavedModel, layers: Layers, told: str | None) -> VersionRange:
    """Return what a file's version can be: its own, or by what only some versions write.

    told: the version that the owner says. Raises ValueError where the file contradicts it.
    """
    if saved.version is not None:
        if told is not None and parse_version(told) != parse_version(saved.version):
            raise ValueError(
                f"the file says version {saved.version} of DALLE-pytorch, and "
                f"--dalle-pytorch-version is {told}; leave the option out"
            )
        return VersionRange(saved.version, saved.version)
    versions = VersionRange()
    for is_there, first, last in _signs(saved, layers):
        if is_there:
            versions = versions.narrowed(first, last)
    if told is not None:
        return VersionRange(told, told).within(versions.first, versions.last)
    if "attn_types" in saved.hyperparameters:
        versions = versions.narrowed("0.3.5")  # train_dalle.py has the flag from then on
    if saved.hyperparameters:
        versions = versions.narrowed(last="1.1.5")  # later ones write their version
    return versions


def _signs(saved: SavedModel, layers: Layers) -> list[tuple[bool, str, str]]:
    """Return what a file has or not, with the first and the last version that do so."""
    weights, (attention, feed_forward) = saved.weights, layers.branches[0]
    is_scaled = "scale" in attention.weights
    is_cached = attention.num_wrappers > feed_forward.num_wrappers
    gain = attention.weights.get("norm.gain")
    return [
        (saved.kind == "kobiso", "0.7.2", "0.7.2"),
        (_has_positions_of_pixels(weights), FIRST, "0.1.25"),
        ("epoch" in saved.names, "0.12.0", LAST),
        (is_scaled, "0.8.0", LAST),
        (not is_scaled, FIRST, "0.7.3"),
        (gain is not None and gain.numel() == 1, "0.5.0", "0.5.1"),
        (gain is not None and gain.numel() > 1, "0.6.0", "0.6.0"),
        ("logits_mask" in weights, FIRST, "0.9.6"),
        ("to_logits.2.weight" in weights, "0.12.1", "0.12.5"),
        ("transformer.pos_emb" in weights or feed_forward.num_wrappers > 2, "1.0.0", LAST),
        ("norm_out.weight" in attention.weights, "1.1.0", LAST),
        (saved.vae_class is not None, "1.1.6", LAST),
        (is_cached, "1.4.0", LAST),
        (not is_cached, FIRST, "1.2.2"),  # the last one before 1.4.0
        ("image_emb.linear.weight" in weights, "1.2.0", LAST),
    ]


def _has_positions_of_pixels(weights: Mapping[str, Tensor]) -> bool:
    """Whether positions span the side of the image in pixels, not that of its grid."""
    positions = axial_positions(weights)
    if positions is None or "logits_mask" not in weights or "text_pos_emb.weight" not in weights:
        return False
    rows, columns = positions
    text_length = shape_of(weights, "text_pos_emb.weight", 2)[0] - 1
    num_codes = shape_of(weights, "logits_mask", 3)[1] - text_length
    return rows.shape[1] * columns.shape[2] != num_codes
