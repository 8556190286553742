"""GET / with DALLE_PLAYGROUND=1: a page to try the model, from files of this package.

GET  /                          the page
GET  /playground/FILE           its style and scripts
GET  /playground/model.json     the model card, with captions to try
GET  /playground/MODEL_CARD.md  the same as text
"""

from __future__ import annotations

from importlib import resources

from flask import Blueprint, Response, abort, request

from dalle.model_card import MODEL_CARD, render
from inference.engine.engine_core import EngineCore

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

# Nothing is loaded from elsewhere and nothing inline is run. Pictures are data of a reply.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def playground(engine_core: EngineCore) -> Blueprint:
    """Return the routes of the page."""
    blueprint = Blueprint("playground", __name__)
    folder = resources.files("inference") / "playground"
    files = {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}

    @blueprint.get("/", defaults={"name": "index.html"})
    @blueprint.get("/playground/<name>")
    def file(name: str) -> Response:
        media_type = _MEDIA_TYPES.get(name.rpartition(".")[2])
        if name not in files or media_type is None:
            abort(404)
        response = Response(files[name], mimetype=media_type)
        response.add_etag()
        response.make_conditional(request)
        return response

    @blueprint.get("/playground/model.json")
    def model() -> Response:
        card = engine_core.engine().card
        return Response(card.model_dump_json(), mimetype="application/json")

    @blueprint.get(f"/playground/{MODEL_CARD}")
    def model_card() -> Response:
        return Response(render(engine_core.engine().card), mimetype="text/markdown")

    @blueprint.after_request
    def protect(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    return blueprint
