"""The page's routes: off by default, from the package's files, under strict headers."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from inference.server.app import create_app
from inference.settings import read_settings
from tests import REPOSITORY
from tests.inference.server.app_fixtures import SETTINGS

FILES = REPOSITORY / "inference" / "playground"


@pytest.fixture
def page(engine_core):
    return create_app(engine_core, replace(SETTINGS, playground=True)).test_client()


def test_the_page_is_off_unless_it_is_asked_for(client):
    assert not read_settings({}).playground
    assert read_settings({"DALLE_PLAYGROUND": "1"}).playground
    for address in ("/", "/playground/main.js", "/playground/model.json"):
        assert client.get(address).status_code == 404


@pytest.mark.parametrize(
    ("address", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/playground/style.css", "text/css; charset=utf-8"),
        ("/playground/main.js", "text/javascript; charset=utf-8"),
        ("/playground/model.json", "application/json"),
        ("/playground/MODEL_CARD.md", "text/markdown; charset=utf-8"),
    ],
)
def test_every_reply_has_its_type_and_the_headers_that_keep_the_page_to_itself(
    page, address, media_type
):
    reply = page.get(address)
    assert (reply.status_code, reply.headers["Content-Type"]) == (200, media_type)
    policy = dict(
        each.strip().split(" ", 1) for each in reply.headers["Content-Security-Policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "address", ["/playground/absent.js", "/playground/..%2fsettings.py", "/playground/", "/x"]
)
def test_no_other_file_is_served(page, address):
    assert page.get(address).status_code == 404


def test_a_file_that_the_browser_has_is_not_sent_again(page):
    tag = page.get("/playground/main.js").headers["ETag"]
    assert page.get("/playground/main.js", headers={"If-None-Match": tag}).status_code == 304


def test_the_model_card_comes_with_captions_to_try(page):
    assert page.get("/playground/model.json").json["captions"] == ["a red square"]
    assert page.get("/playground/MODEL_CARD.md").text.startswith("---\nlicense: ")


def test_while_loading_the_page_is_there_and_the_card_is_a_503(page, engine_core):
    engine_core.cancel_all()
    assert page.get("/").status_code == 200
    reply = page.get("/playground/model.json")
    assert (reply.status_code, reply.json["error"]["code"]) == (503, "engine_stopping")


def test_nothing_in_the_files_is_inline_or_from_elsewhere():
    for path in FILES.iterdir():
        text = path.read_text("utf-8")
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) - {"http://www.w3.org"}
        assert addresses == set(), f"{path.name} names another host"
        if path.suffix == ".html":
            assert not re.search(r"<style|<script(?![^>]* src=)|\son\w+=|\sstyle=", text)


@pytest.mark.slow
def test_the_installed_package_has_every_file_of_the_page(tmp_path):
    program = "import setuptools; setuptools.setup()"
    commands = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    command = [sys.executable, "-W", "ignore", "-c", program, *commands]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    installed = tmp_path / "lib" / "inference" / "playground"
    assert {path.name for path in installed.iterdir()} == {path.name for path in FILES.iterdir()}
