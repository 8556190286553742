"""AWS's error codes: what each means and what to do about it. Knows nothing of boto3."""

from __future__ import annotations

import re

from dalle.errors import AccessError, AwsError, DalleError

MAX_MESSAGE = 500
LOG_IN = (
    "log in again (`aws sso login`, `aws configure`), or set AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN"
)
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
UNKNOWN = {
    "AuthFailure",
    "IncompleteSignature",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
DENIED = {"AccessDenied", "AccessDeniedException", "NotAuthorized", "UnauthorizedOperation", "403"}
THROTTLED = {
    "RequestLimitExceeded",
    "RequestThrottled",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    "429",
}
QUOTA = {"LimitExceededException", "ResourceLimitExceeded", "ServiceQuotaExceededException"}
MISSING = {
    "404",
    "ImageNotFoundException",
    "NoSuchBucket",
    "NoSuchKey",
    "ObjectNotFoundException",
    "RepositoryNotFoundException",
    "ResourceNotFound",
    "ResourceNotFoundException",
}
MISSING_WORDS = re.compile(r"could not find|does not exist|not found", re.IGNORECASE)


def explain_answer(code: str, message: str, action: str, attempts: int) -> DalleError:
    """Return AWS's error as one of ours. action: such as sagemaker:CreateModel."""
    if code in EXPIRED:
        return AccessError(f"the AWS credentials have expired; {LOG_IN}")
    if code in UNKNOWN:
        return AccessError(f"AWS does not know these credentials ({code}: {message}); {LOG_IN}")
    if code in DENIED:
        # The message names the permission, which may differ from the operation's name.
        named = re.search(r"perform:?\s+([\w-]+:\w+)", message)
        action = named[1] if named else action
        return AccessError(
            f"these credentials may not do {action}; ask for that permission ({message or code})"
        )
    if code in THROTTLED:
        return AwsError(
            f"AWS throttled {action}, the last of {attempts} attempts too; wait a minute and "
            "run the same command again: it continues where it stopped"
        )
    if code in QUOTA:
        return AwsError(
            f"a quota of this account stops {action}: {message} "
            "(quotas are raised in the Service Quotas console; that of a GPU type often begins "
            "at 0)"
        )
    return AwsError(f"{action} was refused: {code}: {message}")


def plain(text: str) -> str:
    """Return a message as one line without tags: a failing server may answer with HTML."""
    return " ".join(re.sub(r"<[^<>]*>|\\n", " ", text).split())[:MAX_MESSAGE]


def is_absence(code: str, message: str) -> bool:
    """Return whether an error means that the resource does not exist."""
    is_validation = code in ("ValidationException", "ValidationError")
    return code in MISSING or (is_validation and MISSING_WORDS.search(message) is not None)
