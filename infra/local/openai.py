"""The path that an endpoint has for OpenAI's clients, and the bearer tokens that open it.

`POST /endpoints/NAME/openai/v1/chat/completions` reaches the container as `POST
/v1/chat/completions`, and its reply comes back as it is. A token is a signed address of SageMaker's
CallWithBearerToken in base64, as `sagemaker.core.token_generator` makes it. Signatures are not
checked. Standard library only.
"""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

OPERATION = "openai/v1/chat/completions"
CONTAINER_PATH = "/v1/chat/completions"
TOKEN_PREFIX = "sagemaker-api-key-"  # noqa: S105 - what every token begins with
MAX_TOKEN_SECONDS = 12 * 3600

_HOST = "sagemaker.amazonaws.com"
_FIELDS = ("X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-Signature")


def token_fault(authorization: str | None, now: datetime | None = None) -> str | None:
    """Return what is wrong with an Authorization header; None for a token that is valid at `now`.

    now: with its time zone; by default the time of the call.
    """
    scheme, _, token = (authorization or "").partition(" ")
    if scheme != "Bearer" or not token:
        return "Missing Authentication Token"
    if not token.startswith(TOKEN_PREFIX):
        return f"the bearer token does not begin with {TOKEN_PREFIX}"
    try:
        address = base64.b64decode(token.removeprefix(TOKEN_PREFIX), validate=True).decode("ascii")
        parts = urlsplit(f"https://{address}")
        fields = {name: values[0] for name, values in parse_qs(parts.query).items()}
        missing = [name for name in ("Action", *_FIELDS) if name not in fields]
        if missing:
            return f"the bearer token has no {', '.join(missing)}"
        began = datetime.strptime(fields["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        seconds = int(fields["X-Amz-Expires"])
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return "the bearer token cannot be read: it is no signed address in base64"
    if parts.hostname != _HOST or fields["Action"] != "CallWithBearerToken":
        return f"the bearer token is not for CallWithBearerToken of {_HOST}"
    if not 0 < seconds <= MAX_TOKEN_SECONDS:
        return f"the bearer token must be valid for 1 to {MAX_TOKEN_SECONDS} s, got {seconds}"
    if (now or datetime.now(UTC)) > began + timedelta(seconds=seconds):
        return "the bearer token has expired"
    return None
