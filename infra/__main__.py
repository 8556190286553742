"""`python -m infra COMMAND`: everything between the image and AWS.

Exit codes: 0 it worked (or was there already), 1 it failed, 2 the command line is wrong,
130 interrupted. Errors are one message that says what to do; a traceback is a mistake of ours.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import logging
import sys
from collections.abc import Sequence

from dalle.errors import DalleError
from infra.commands import COMMANDS, Command

FAILED = 1
USAGE = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else USAGE
    name = words[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}"
        print(f"there is no command {name!r}{hint}", file=sys.stderr)
        return USAGE
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        module = importlib.import_module(COMMANDS[name].module)
        options = parser_of(name, COMMANDS[name], module).parse_args(words[1:])
    except SystemExit as exit_:  # argparse's own: 0 after --help, 2 after a mistake
        return exit_.code if isinstance(exit_.code, int) else USAGE
    try:
        return int(module.run(options))
    except DalleError as error:
        return _failed(error, as_json=getattr(options, "json", False))
    except Exception as error:
        from infra.aws.client import told  # loads boto3, which not every command needs

        explained = told(error)
        if explained is None:
            raise
        return _failed(explained, as_json=getattr(options, "json", False))
    except KeyboardInterrupt:
        print("\ninterrupted; what was begun at AWS goes on there", file=sys.stderr)
        return INTERRUPTED


def overview() -> str:
    """What `--help` without a command shows."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m infra COMMAND [options]",
            "",
            *lines,
            "",
            "`python -m infra COMMAND --help` shows a command's options, with examples.",
            "Exit codes: 0 it worked or was there already, 1 it failed, 2 the command line is "
            "wrong.",
        ]
    )


def parser_of(name: str, command: Command, module: object) -> argparse.ArgumentParser:
    """The parser of one command, with its examples below the options."""
    parser = argparse.ArgumentParser(
        prog=f"python -m infra {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  python -m infra {e}" for e in command.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser


def _failed(error: DalleError, *, as_json: bool) -> int:
    print(f"{error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"code": error.code, "message": str(error)}}))
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
