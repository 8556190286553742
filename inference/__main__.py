"""Command `serve`: answers SageMaker's endpoint protocol with a trained artefact.

environment -> Settings -> Server: port, worker process -> model loaded -> ready
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle.errors import PlatformError, UserError
from dalle.platform.environment import DEFAULT_ROOT, Paths, unknown_variables
from dalle.platform.threads import spin_briefly
from dalle.platform.user import name_user
from dalle.versions import versions_line
from inference.api.content_credentials import Credentials, read_credentials, signer
from inference.settings import VARIABLES, Settings, read_port, read_settings

if TYPE_CHECKING:
    from inference.engine.model_runner import ModelRunner

logger = logging.getLogger("inference")

_STATUSES = (
    (0, "stopped by SIGTERM, SIGINT or SIGQUIT"),
    (1, "the port cannot be bound"),
    (2, "the command line, a variable or --root is wrong"),
    (
        3,
        "the server process cannot begin: this installation is broken, or no directory is writable",
    ),
    (4, "the model cannot be loaded, fails its self-test, or its process ends again and again"),
)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_VERSIONS_OF = ("torch", "numpy", "pydantic", "flask", "gunicorn")


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped.

    Returns 2 or 3 for an error before the port is bound; raises SystemExit with the other statuses
    of `_STATUSES`. The last line of the log is the cause.
    """
    options = _parser().parse_args(arguments)
    spin_briefly()
    name_user()
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logger.info("serve %s", versions_line(_VERSIONS_OF))
    for sentence in unknown_variables(os.environ, VARIABLES):
        logger.warning("%s", sentence)
    try:
        settings = read_settings(os.environ)
        port = read_port(os.environ, options.port)
        credentials = read_credentials(*settings.c2pa_files) if settings.c2pa_files else None
        model = Paths(options.root).model
        if not model.is_dir():
            raise UserError(
                f"{model} is not a directory; --root must be the directory that holds `model`, "
                "where `train` left its artefact"
            )
    except UserError as error:
        logger.error("%s", error)
        return 2

    from inference.server.server import Server

    try:
        load = partial(_load, model, settings, credentials)
        server = Server(load, settings, host=options.host, port=port)
    except PlatformError as error:
        logger.error("serve cannot begin: %s", error)
        return 3
    server.run()  # raises SystemExit, in this process and in the worker process
    return 0


class _OneLine(logging.Formatter):
    """Formatter of log lines that text from a client cannot forge: control characters are escaped.

    Lines of a traceback are indented.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return _CONTROL.sub(_escape, super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {_CONTROL.sub(_escape, line)}" for line in lines)


def _escape(control: re.Match[str]) -> str:
    return ascii(control[0])[1:-1]


def _load(model: Path, settings: Settings, credentials: Credentials | None) -> ModelRunner:
    """Import torch, choose device and threads and load the artefact, in the model's thread."""
    from dalle.platform.limits import usable_cpus
    from inference.api.marks import mark_of
    from inference.engine.model_runner import ModelRunner

    sign = signer(credentials) if credentials is not None else None
    return ModelRunner.load(
        model,
        settings.device,
        threads=settings.threads,
        most_threads=usable_cpus(),
        chunk_size=settings.chunk_size,
        window=settings.parallel_positions,
        precision=settings.precision,
        mark_of=partial(mark_of, signer=sign) if settings.mark else None,
    )


def _parser() -> argparse.ArgumentParser:
    lines = ["environment variables:"]
    for name, field in VARIABLES.items():
        default = f" (default {field.default})" if field.default else ""
        lines.append(f"  {name}\n      {field.description}{default}")
    lines += ["", "exit status, whose cause is the last line of the log:"]
    lines += [f"  {status}  {meaning}" for status, meaning in _STATUSES]
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Answer SageMaker's endpoint protocol: GET /ping, POST /invocations, "
        "GET /execution-parameters, /metrics and /openapi.json; and OpenAI's clients: POST "
        "/v1/images/generations, /v1/images/edits, /v1/chat/completions, GET /v1/models.",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=DEFAULT_ROOT,
        help="directory that holds `model`, the artefact to serve (default %(default)s)",
    )
    parser.add_argument(
        "--host",
        default="0.0.0.0",  # noqa: S104 - the platform calls from outside the container
        help="address to listen on (default %(default)s, as the platform demands)",
    )
    parser.add_argument(
        "--port", type=int, default=None, help="port to listen on, 0 for a free one (default 8080)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
