"""Bodies of POST /v1/images/edits: parts of a form, with the files of an image and a mask.

form -> EditRequest, image, rows that the mask keeps -> Call with a prime image
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from dalle.errors import UserError
from inference.api.parsing import validate
from inference.api.schema import Limits
from inference.openai.masks import kept_rows
from inference.openai.requests import Call, images_call, parted
from inference.openai.schema import PASSED_BY_EDITS, EditRequest

_MAX_PARTS = 64  # no request has so many
_MAX_TEXT_BYTES = 1 << 16
_READ_BYTES = 1 << 16  # that the parser takes at once
# The parser has one limit for a text and for what it holds unparsed: what it takes, behind the end
# of the last, which may be the beginning of a boundary. That holds for files, too.
_MAX_FORM_BYTES = _MAX_TEXT_BYTES + _READ_BYTES
_MAX_NUMBER_CHARACTERS = 100
_FILES = ("image", "mask")
_TEXTS = frozenset(
    {
        *("prompt", "model", "user", "safety_identifier", "size", "response_format"),
        *("output_format", "background", "quality", "style", "moderation", "input_fidelity"),
    }
)


def read_edit(
    body: bytes,
    content_type: str | None,
    *,
    limits: Limits,
    image_size: int | None,
    grid_size: int | None,
) -> Call:
    """Return the call in the body of POST /v1/images/edits.

    content_type: the header, whose boundary parts the body; image_size, grid_size: as for
    `read_generation`. The call's fields have no image and no mask any more.
    Raises `UserError`: 400 for a body that is no form, 413 for too many or too long parts, 422 for
    faults of the fields, the image and the mask.
    """
    texts, files = _parts(body, content_type)
    fields: dict[str, Any] = {name: _value(name, text) for name, text in texts.items()}
    for name in _FILES:
        if fields.get(name) is not None:
            raise _wrong(name, f"{name} must be a file, got a text: {fields[name]!r:.60}")
    fields |= {name: _one(name, each) for name, each in files.items()}
    own, passed = parted(fields, PASSED_BY_EDITS)
    edit = validate(EditRequest, own, limits, image_size=image_size, also=PASSED_BY_EDITS)
    rows = kept_rows(edit.image, edit.mask, grid_size) if grid_size else 1
    prime = {"prime_image": base64.b64encode(edit.image).decode("ascii"), "prime_rows": rows}
    edit = edit.model_copy(update={"image": b"", "mask": None})  # large, and read
    return images_call(edit, {**passed, **prime}, limits=limits, grid_size=grid_size)


def _parts(
    body: bytes, content_type: str | None
) -> tuple[dict[str, str], dict[str, Sequence[bytes]]]:
    """Return the texts and the files of a form by their names, `image[]` as `image`."""
    media_type, options = parse_options_header(content_type)
    parser = FormDataParser(
        stream_factory=lambda *_, **__: io.BytesIO(),
        max_form_memory_size=_MAX_FORM_BYTES,
        max_form_parts=_MAX_PARTS,
        silent=False,
    )
    try:
        _, form, uploads = parser.parse(io.BytesIO(body), media_type, len(body), options)
    except RequestEntityTooLarge as error:
        raise UserError(
            f"the form has more than {_MAX_PARTS} parts, or a text of more than "
            f"{_MAX_FORM_BYTES:,} bytes",
            status=413,
            code="payload_too_large",
        ) from error
    except ValueError as error:
        raise UserError(
            f"the body is no multipart/form-data ({error})", code="malformed_body"
        ) from error
    files: MultiDict[str, bytes] = MultiDict()
    for name, upload in uploads.items(multi=True):
        files.add(name.removesuffix("[]"), upload.read())
    return form.to_dict(), {name: files.getlist(name) for name in files}


def _value(name: str, text: str) -> Any:
    """Return the value of a field that came as text, such as `4` or `true`."""
    if name in _TEXTS or len(text) > _MAX_NUMBER_CHARACTERS:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # its field refuses it


def _one(name: str, files: Sequence[bytes]) -> bytes:
    if name not in _FILES:
        raise _wrong(name[:60], f"{name[:60]} is a file; files are {' and '.join(_FILES)}")
    if len(files) > 1:
        raise _wrong(
            name, f"{name} must be one file, got {len(files)}: the model continues a single image"
        )
    return files[0]


def _wrong(field: str, message: str) -> UserError:
    return UserError(message, field=field, status=422, code="invalid_request")
