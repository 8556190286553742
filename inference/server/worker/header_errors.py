"""Replies to headers that gunicorn cannot read, in JSON as every other error."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus

from gunicorn.http import errors

logger = logging.getLogger(__name__)

_MESSAGE_CHARACTERS = 200  # of gunicorn's message, which quotes the header

_STATUSES: tuple[tuple[type[Exception], HTTPStatus], ...] = (
    (errors.LimitRequestHeaders, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE),
    (errors.LimitRequestLine, HTTPStatus.REQUEST_URI_TOO_LONG),
    (errors.ExpectationFailed, HTTPStatus.EXPECTATION_FAILED),
    (errors.UnsupportedTransferCoding, HTTPStatus.NOT_IMPLEMENTED),
    (errors.ParseException, HTTPStatus.BAD_REQUEST),
)


def header_refusal(error: Exception) -> bytes | None:
    """Return the whole reply to a header with that error; None for an error of another kind."""
    status = next((status for kind, status in _STATUSES if isinstance(error, kind)), None)
    if status is None:
        return None
    code = status.phrase.lower().replace(" ", "_").replace("-", "_")
    reason = str(error)
    logger.info("refused: status=%d; code=%s; field=None", status, code)
    logger.debug("the header cannot be read: %s", reason)
    if len(reason) > _MESSAGE_CHARACTERS:
        reason = f"{reason[:_MESSAGE_CHARACTERS]}… ({len(reason):,} characters)"
    detail = {"code": code, "message": f"the header cannot be read: {reason}", "field": None}
    body = json.dumps({"error": detail}).encode()
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
