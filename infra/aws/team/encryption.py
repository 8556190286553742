"""The KMS keys of disks and of what jobs and endpoints write to the bucket.

Without a key the platform encrypts by keys of its own. Knows nothing of any command.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from infra.aws.limits import has_own_disk
from infra.aws.request import has_placeholder

_ID = r"(mrk-)?[0-9a-f-]{32,36}"
_ARN = rf"arn:aws[a-z-]*:kms:(?P<region>[a-z0-9-]+):\d{{12}}:(key/{_ID}|alias/[\w/-]+)"
_KEY = re.compile(rf"{_ID}|alias/[\w/-]+|{_ARN}")


@dataclass(frozen=True)
class Encryption:
    """volume, output: a key's id, ARN or alias; empty for the platform's own key.

    volume_is_wanted: the command itself names a key of the disk, so that a host whose disk cannot
    use it is refused. Otherwise the key is left out for such a host.
    """

    volume: str = ""
    output: str = ""
    volume_is_wanted: bool = False

    def volume_key(self, instance_type: str | None) -> str | None:
        """Return the key of a host's disk; None where there is none or the host takes none."""
        if not self.volume or instance_type is None or has_own_disk(instance_type):
            return None
        return self.volume

    def volume_fields(self, name: str, instance_type: str | None) -> dict[str, str]:
        """Return the API's field of this name, of a key of the disk, or no field."""
        key = self.volume_key(instance_type)
        return {name: key} if key else {}

    @property
    def output_fields(self) -> dict[str, str]:
        """The API's KmsKeyId of a place in the bucket, or no field."""
        return {"KmsKeyId": self.output} if self.output else {}

    def problems(self, instance_type: str | None, *, is_job: bool) -> Iterator[str]:
        """Yield why these keys cannot be used on a host. instance_type: None if serverless."""
        if self.volume_is_wanted and instance_type is None:
            yield "a serverless endpoint has no disk: leave --volume-kms-key out"
        elif self.volume_is_wanted and has_own_disk(str(instance_type)):
            yield (
                f"{instance_type} has a built-in disk, which its own hardware encrypts: "
                "leave --volume-kms-key out, or take a type without one"
            )
        elif is_job and "alias/" in self.volume and self.volume_key(instance_type):
            yield (
                "the disk of a job takes a key by its id or its key's ARN, "
                f"got the alias {self.volume}"
            )


def of_other_regions(keys: Iterable[str], region: str) -> Iterator[str]:
    """Yield, in words, the keys that are of another region than the requests.

    region: a placeholder of a dry run passes every key.
    """
    for key in dict.fromkeys(keys):
        found = re.fullmatch(_ARN, key)
        if found and found["region"] != region and not has_placeholder(region):
            yield f"the key {key} is of {found['region']}, and the requests go to {region}"


def add_arguments(parser: argparse._ActionsContainer) -> None:
    add_key(parser, "--kms-key", "for disks and outputs alike")
    add_key(parser, "--volume-kms-key", "for the disks of the hosts")
    add_key(parser, "--output-kms-key", "for models and replies that are written to the bucket")


def add_key(parser: argparse._ActionsContainer, option: str, help: str) -> None:
    """Add an option that names a KMS key."""
    parser.add_argument(option, type=kms_key, metavar="KEY", help=f"a KMS key {help}")


def kms_key(text: str) -> str:
    """Return `text` if it names a key; the empty text is none. For argparse."""
    if not text or _KEY.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(
        "a KMS key is named by its ARN (arn:aws:kms:REGION:ACCOUNT:key/…), its id or alias/NAME, "
        f"got {text!r}"
    )


def is_key_arn(key: str) -> bool:
    """Return whether a key is named by its own ARN, as the policies of roles need it."""
    return re.fullmatch(_ARN, key) is not None and ":key/" in key


def merged(kept: Encryption, options: argparse.Namespace) -> Encryption:
    """Return the keys with what the options of `add_arguments` give in place of what is kept."""
    both, volume, output = options.kms_key, options.volume_kms_key, options.output_kms_key
    return Encryption(
        volume=_first(volume, both, kept.volume),
        output=_first(output, both, kept.output),
        volume_is_wanted=bool(volume),
    )


def of_parameters(parameters: Mapping[str, str]) -> Encryption:
    """Return the keys of the project's stack from its parameters."""
    return Encryption(parameters.get("VolumeKmsKey", ""), parameters.get("OutputKmsKey", ""))


def _first(*values: str | None) -> str:
    return next((value for value in values if value is not None), "")
