"""Log entries of unexpected errors, without what a client sent.

The message of any exception may quote a caption. It is logged above DEBUG only where it is known
to quote none; the kind of the error and its traceback always are.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterable, Iterator

_LEAST_LETTERS = 3  # of a word whose presence in a message counts as a quotation


class UnshownMessage(Exception):  # noqa: N818 - reads as what it is
    """Stands in a log for an error whose message may quote a request."""


def log_unexpected(
    logger: logging.Logger, what: str, error: BaseException, texts: Iterable[str] | None = None
) -> None:
    """Log an error with its traceback; its message too where it has no word of `texts`.

    texts: captions of the requests that failed; None where they are not known.
    """
    if texts is not None and not _quotes(error, texts):
        logger.error("%s", what, exc_info=error)
    else:
        logger.error("%s", what, exc_info=_without_messages(error))
        logger.debug("%s", what, exc_info=error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = _cause(current)


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _quotes(error: BaseException, texts: Iterable[str]) -> bool:
    """Return whether a message may quote a text: any does one in a script that may lack blanks."""
    lines = [line for each in _causes(error) for line in traceback.format_exception_only(each)]
    said = "".join(lines)
    words = _words(said)
    return any(
        not text.isascii() or text in said or not words.isdisjoint(_words(text))
        for text in texts
        if text
    )


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) >= _LEAST_LETTERS}


def _without_messages(error: BaseException) -> UnshownMessage:
    """Return an error of the same traceback and causes that has the kind as its message."""
    shown = UnshownMessage(f"{type(error).__qualname__}; its message is logged at DEBUG")
    cause = _cause(error)
    if cause is not None:
        shown.__cause__ = _without_messages(cause)
    return shown.with_traceback(error.__traceback__)
