"""Command `python -m training.legacy`: models of DALLE-pytorch, inspected and imported."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle import artefact as artefacts
from dalle.errors import DalleError, ForeignFileError
from training.job.legacy.config.choices import THEIR_KINDS, Choices
from training.job.legacy.config.versions import parse_version
from training.job.legacy.describe import describe, describe_saved
from training.job.legacy.importer import Beside, import_saved, read_model

HELP = """\
Models that DALLE-pytorch (lucidrains) trained, versions 0.1.19 to 1.6.6: say what a file is, or
make a servable artefact of it.

  FILE   a .pt of train_dalle.py, bare weights, kobiso's release, or a folder NAME-ds-cp of
         DeepSpeed's, ZeRO-3's shards included

`inspect` also names ruDALL-E (Malevich, Emojich) and minDALL-E, which are not imported: it says
why, and that is exit code 0.
Nothing that a file says is executed, and neither DALLE-pytorch nor DeepSpeed is needed.
Exit code: 0 done, 1 a fault of the disk, 2 a file is refused or the usage is wrong; after 1 and 2
nothing is written.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parse_arguments(arguments)
    choices = Choices(
        attention_kinds=options.attn_types,
        version=options.dalle_pytorch_version,
        num_heads=options.heads,
        is_stable=options.stable,
        hides_padding=options.hidden_padding,
    )
    try:
        if options.command == "inspect":
            description = describe(options.file, choices)
            if options.json:
                print(json.dumps(description.as_json(), ensure_ascii=False, indent=1))
            else:
                print(description.as_text())
            return 0
        return _import(options, choices)
    except DalleError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ForeignFileError) else 1


def _import(options: argparse.Namespace, choices: Choices) -> int:
    out: Path = options.out
    _check_out(out)
    saved = read_model(options.file)
    beside = Beside(options.tokenizer, options.vae)
    artefact = import_saved(saved, options.file, choices, beside)
    artefact.manifest.licence = options.licence
    artefacts.save(out, artefact)
    for note in describe_saved(options.file.name, saved, choices).notes:
        print(f"note: {note}")
    print(f"wrote {', '.join(artefact.components())} to {out}")
    return 0


def _check_out(out: Path) -> None:
    """Raise ForeignFileError for a folder that is not empty, or cannot be made."""
    try:
        there = next(each for each in (out, *out.absolute().parents) if _is_there(each))
        if there == out and (not out.is_dir() or any(out.iterdir())):
            raise ForeignFileError(f"--out {out} is there already; name a folder that is not")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ForeignFileError(f"--out {str(out)[:80]} cannot be written: {reason}") from error
    if not there.is_dir():
        raise ForeignFileError(f"--out {out} lies below {there}, which is no folder")


def _is_there(path: Path) -> bool:
    """Return whether a name is taken, also by a link to nothing. Raises OSError or ValueError."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training.legacy",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say what a file is and what it lacks")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    importing = commands.add_parser("import", help="write a servable artefact")
    importing.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="the tokenizer.json that the model was trained with, or clip for the byte pairs of "
        "OpenAI's CLIP (default: clip, where it fits)",
    )
    importing.add_argument(
        "--vae",
        type=Path,
        metavar="FOLDER",
        help="the VAE's files, as for the channel tokenizer_model (default: those in FILE)",
    )
    importing.add_argument("--out", type=Path, required=True, metavar="ARTEFACT")
    importing.add_argument(
        "--licence", default="", metavar="TEXT", help="licence of the model, for its card"
    )
    for command in (inspect, importing):
        command.add_argument("file", type=_file, metavar="FILE")
        command.add_argument(
            "--attn-types",
            type=_kinds,
            metavar="KINDS",
            help=f"attention of the layers, separated by commas and repeated: "
            f"{', '.join(THEIR_KINDS)} (default: what FILE tells)",
        )
        command.add_argument(
            "--dalle-pytorch-version",
            type=_version,
            metavar="VERSION",
            help="version that trained the model, where FILE does not tell",
        )
        command.add_argument(
            "--heads",
            type=_positive,
            metavar="NUMBER",
            help="attention heads, where FILE does not tell",
        )
        command.add_argument(
            "--stable",
            action=argparse.BooleanOptionalAction,
            help="whether it was trained with --stable, where FILE does not tell",
        )
        command.add_argument(
            "--hidden-padding",
            action=argparse.BooleanOptionalAction,
            help="up to 0.8.3: whether padding was hidden from attention (default: it was)",
        )
    return parser.parse_args(arguments)


def _file(text: str) -> Path:
    """Return a path that has a name, for what is said of it: `.` has none."""
    path = Path(text)
    return path if path.name not in ("", "..") else path.resolve()


def _kinds(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(","))


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number from 1, got {text!r}")
    return number


def _version(text: str) -> str:
    try:
        parse_version(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


if __name__ == "__main__":
    sys.exit(main())
