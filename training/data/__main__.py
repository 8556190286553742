"""Check or pack a channel before a job: `python -m training.data doctor | shard | cub | bench`.

Exit status: 0 when all is well, 1 when the data are not fit for training, 2 for a wrong command.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from dalle.errors import DataError, UserError
from training.config.fields import DEFAULT_MAX_BAD_SHARE, Hyperparameters
from training.config.hyperparameters import parse
from training.data.held_out import refuse_mixture
from training.data.sources.channel import open_channel
from training.data.tools import cub
from training.data.tools.bench import compare_layouts, measure
from training.data.tools.check import check
from training.data.tools.sharding import write_shards

FINE, BAD, USAGE = 0, 1, 2
OF_A_CHANNEL = ("max_bad_share", "caption_key")
OF_CAPTIONS = ("text_length", "long_captions", "tokenizer_kind", "tokenizer_vocab_size")
"""Hyperparameters that are options of the same name, with their ranges and defaults."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        status: int = arguments.run(arguments)
    except DataError as error:
        print(error, file=sys.stderr)
        return BAD
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return USAGE
    return status


def doctor(arguments: argparse.Namespace) -> int:
    """Check a channel and print the findings."""
    for directory in filter(None, (arguments.channel, arguments.validation)):
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory")
    settings = _settings(arguments, [*OF_A_CHANNEL, *OF_CAPTIONS, "image_size"])
    image_size = int(arguments.image_size)
    findings = check(arguments.channel, arguments.validation, settings, image_size)
    if arguments.html is not None:
        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        arguments.html.write_text(findings.as_html(), encoding="utf-8", errors="backslashreplace")
    print(findings.as_json() if arguments.json else findings.as_text())
    return BAD if findings.problems else FINE


def shard(arguments: argparse.Namespace) -> int:
    """Write a channel as tar shards."""
    if arguments.out.resolve().is_relative_to(arguments.channel.resolve()):
        raise UserError(f"{arguments.out} lies within {arguments.channel}; give another directory")
    if not arguments.channel.is_dir():
        raise UserError(f"{arguments.channel} is not a directory")
    settings = _settings(arguments, OF_A_CHANNEL)
    dataset = open_channel(
        arguments.channel,
        image_size=1,  # nothing is decoded
        max_bad_share=settings.max_bad_share,
        caption_key=settings.caption_key or None,
    )
    refuse_mixture(dataset, arguments.channel)
    written = write_shards(
        dataset,
        arguments.out,
        megabytes=arguments.megabytes,
        seed=arguments.seed,
        shrink_to=arguments.shrink_to,
    )
    print(
        f"{arguments.out}: {written.num_pairs:,} pairs with {written.num_captions:,} captions in "
        f"{written.num_shards:,} shards of {written.num_bytes / written.num_shards / 1e6:,.1f} MB; "
        f"skipped: {dataset.skips.describe() or 'none'}"
    )
    return FINE


def bench(arguments: argparse.Namespace) -> int:
    """Measure how fast images are loaded; the last line is JSON."""
    rows = measure(arguments.image_size, arguments.seconds)
    print("images            MB  images/s per core  MB/s")
    for row in rows:
        size = f"{row.width} x {row.height}"
        print(
            f"{size:<11}{row.image_megabytes:9.3f}{row.images_per_cpu_second:19.0f}"
            f"{row.image_megabytes * row.images_per_cpu_second:6.0f}"
        )
    shares = compare_layouts(arguments.image_size, arguments.seconds)
    print("speed of other layouts, as a share of that of tar shards")
    for layout, share in shares.items():
        print(f"{layout:<16}{share:.2f}")
    found = {"sizes": [asdict(row) for row in rows], "layouts": shares}
    print(json.dumps({"image_size": arguments.image_size} | found))
    return FINE


def cub_folders(arguments: argparse.Namespace) -> int:
    """Write CUB-200-2011 as image-text folders."""
    converted = cub.convert(
        arguments.directory, arguments.out, text=arguments.text, held_out=arguments.held_out
    )
    print(
        f"{arguments.out}: {converted.num_train:,} training and {converted.num_validation:,} "
        f"held-out pairs with {converted.num_captions:,} captions; "
        f"{converted.num_mended:,} caption files were not UTF-8 and were read as Latin-1; "
        f"skipped: {converted.skips.describe() or 'none'}"
    )
    converted.skips.num_pairs = converted.num_train + converted.num_validation
    converted.skips.check_share(DEFAULT_MAX_BAD_SHARE)
    return FINE


def _settings(arguments: argparse.Namespace, names: Iterable[str]) -> Hyperparameters:
    """Return a job's hyperparameters as far as they were given. Raises HyperparameterError."""
    given = {name: getattr(arguments, name) for name in names}
    return parse({name: value for name, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("doctor", help="check a channel before a job is paid for")
    command.set_defaults(run=doctor)
    _add_channel(command)
    command.add_argument("--validation", type=Path, help="the held-out channel, checked for leaks")
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    command.add_argument("--image-size", default="256", help="as the job's, default 256")
    for name in OF_CAPTIONS:
        command.add_argument(f"--{name.replace('_', '-')}", help="as the job's")

    command = commands.add_parser("shard", help="write a channel as tar shards")
    command.set_defaults(run=shard)
    _add_channel(command)
    command.add_argument("--out", type=Path, required=True, help="a new directory")
    command.add_argument(
        "--megabytes", type=_megabytes, default=100.0, help="size of a shard, default 100"
    )
    command.add_argument("--seed", type=int, default=0, help="of the order")
    command.add_argument(
        "--shrink-to", type=_side, metavar="PIXELS", help="of the shorter side of larger images"
    )

    command = commands.add_parser("bench", help="measure how many images a second are loaded")
    command.set_defaults(run=bench)
    command.add_argument("--image-size", type=_side, default=256, help="default 256")
    command.add_argument("--seconds", type=float, default=3.0, help="of CPU time for each size")

    command = commands.add_parser("cub", help="write CUB-200-2011 as image-text folders")
    command.set_defaults(run=cub_folders)
    command.add_argument("directory", type=Path, help="CUB_200_2011, with its folder images")
    command.add_argument("--out", type=Path, required=True, help="a new directory")
    command.add_argument(
        "--text", type=Path, help="folder of captions; default: text or text_c10 in DIRECTORY"
    )
    command.add_argument(
        "--held-out", type=Path, metavar="FILE", help="classes to hold out, one a line"
    )
    return parser


def _add_channel(command: argparse.ArgumentParser) -> None:
    command.add_argument("channel", type=Path, help="folder of any layout that train reads")
    command.add_argument("--max-bad-share", help="as the job's")
    command.add_argument("--caption-key", help="column or JSON key of the captions")


def _side(text: str) -> int:
    value = int(text)
    if not 8 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"must be 8 to 4096 pixels, got {text}")
    return value


def _megabytes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 10_000:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 10000, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
