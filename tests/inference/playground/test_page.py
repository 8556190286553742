"""The page in a real browser: from a caption to ranked pictures, and the same ones by a link."""

import base64
import json
import re
import time
import zipfile
from typing import Any

import pytest

from tests.inference.playground.conftest import CAPTIONS, PATIENCE

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def generate(page: Any, **fields: object) -> None:
    """Fill in the form, send it and wait for the ranked order."""
    fill(page, **fields)
    press(page, "#generate")


def press(page: Any, button: str) -> None:
    """Press a button that begins a run, and wait until it is the session's newest."""
    runs = page.locator("#runs li").count()
    page.click(button)
    page.wait_for_selector(f"#runs li:nth-child({runs + 1})", state="attached")


def fill(page: Any, **fields: object) -> None:
    if not page.is_visible("#fields"):
        page.click("#settings > summary")
    for name, value in {"caption": "big filled red star", "num_candidates": 5, **fields}.items():
        page.fill(f"#{name}", str(value))


def order(page: Any) -> list[int]:
    """The candidates in the order in which the page shows them."""
    return [int(each.get_attribute("data-candidate")) for each in page.query_selector_all(".tile")]


def downloaded(page: Any, button: str) -> Any:
    with page.expect_download() as download:
        page.click(button)
    return download.value


def archive(page: Any) -> dict[str, bytes]:
    """The files of `Download all`, whose archive Python's own reader checks."""
    with zipfile.ZipFile(downloaded(page, "#zip").path()) as files:
        assert files.testzip() is None
        return {name: files.read(name) for name in files.namelist()}


def assert_same_pictures(files: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same bytes of the same names in the same order, and the same facts.

    The last bits of the scores depend on how many pictures were sampled, and read by CLIP, at once,
    which depends on time.
    """
    facts, pictures = json.loads(files["pictures.json"]), {**files, "pictures.json": b""}
    wanted, originals = json.loads(expected["pictures.json"]), {**expected, "pictures.json": b""}
    assert list(pictures) == list(originals)
    assert pictures == originals
    for one, other in zip(facts["pictures"], wanted["pictures"], strict=True):
        assert one.pop("clip_score") == pytest.approx(other.pop("clip_score"), abs=1e-5)
        likelihood = other.pop("log_likelihood")
        assert one.pop("log_likelihood") == pytest.approx(likelihood, abs=1e-3)
    assert facts == wanted


def metric(served: Any, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", served.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def wait_until(holds: Any) -> None:
    until = time.monotonic() + PATIENCE / 1_000
    while not holds():
        assert time.monotonic() < until, "it did not come to pass"


def test_candidates_stream_in_and_end_in_the_order_of_their_ranks(new_page, served):
    page = new_page()
    # What the grid went through, in order; the page itself keeps no such record.
    page.evaluate(
        """() => {
          window.seen = [];
          new MutationObserver(() => {
            for (const kind of ["unfinished", "finished", "best"]) {
              if (document.querySelector(`.${kind}`) && !seen.includes(kind)) seen.push(kind);
            }
          }).observe(grid, { subtree: true, childList: true, attributes: true });
        }"""
    )
    generate(page, num_candidates=6)
    assert page.evaluate("seen") == ["unfinished", "finished", "best"]
    seed = int(page.input_value("#seed"))
    reply = served.ask(
        caption="big filled red star", num_candidates=6, num_images=6, seed=seed
    ).json()
    assert order(page) == [each["candidate"] for each in reply["images"]]
    assert page.inner_text(".best .badge") == "1"
    files = archive(page)
    facts = json.loads(files.pop("pictures.json"))
    assert facts["request"]["seed"] == seed
    assert list(files.values()) == [base64.b64decode(each["image"]) for each in reply["images"]]
    assert all(b"trainedAlgorithmicMedia" in file for file in files.values())
    assert page.inner_text("#status").startswith("6 pictures, the best first by")
    for stage in ("queue", "sample", "decode", "rank", "encode"):
        assert re.search(rf"{stage}\s+[\d.]+ s", page.inner_text("#timings"))


def test_a_link_gives_identical_pictures(new_page):
    page = new_page()
    generate(page, temperature="0.9", top_k="8")
    files, fragment = archive(page), page.evaluate("location.hash")
    assert "seed=" in fragment
    page.reload()
    page.wait_for_selector("#grid.ranked")
    assert_same_pictures(archive(page), files)
    other = new_page(fragment)
    other.wait_for_selector("#grid.ranked")
    assert_same_pictures(archive(other), files)


def test_a_link_to_pictures_that_continue_another_gives_them_again(new_page):
    page = new_page()
    generate(page)
    page.click(".tile:nth-child(2) .picture")
    press(page, "#picture-prime")
    assert page.inner_text("#prime-rows-words") == "2 of 4"
    files, fragment = archive(page), page.evaluate("location.hash")
    other = new_page(fragment)
    other.wait_for_selector("#grid.ranked")
    assert_same_pictures(archive(other), files)
    assert json.loads(files["pictures.json"])["prime"]["rows"] == 2


def test_every_run_has_a_new_seed_unless_one_is_given(new_page):
    page = new_page()
    generate(page, num_candidates=1)
    first = page.input_value("#seed")
    press(page, "#generate")
    assert page.input_value("#seed") != first
    generate(page, num_candidates=1, seed=7)
    assert "seed=7" in page.url


def test_cancel_frees_the_servers_slots(new_page, slow_served):
    page = new_page(server=slow_served)
    fill(page, num_candidates=512)
    page.click("#generate")
    wait_until(lambda: metric(slow_served, "dalle_busy_slots") > 0)
    page.wait_for_selector(".finished")
    page.click("#cancel")
    page.wait_for_selector("#generate:visible")
    assert re.match(r"Cancelled after \d+ of 512", page.inner_text("#status"))
    wait_until(lambda: metric(slow_served, "dalle_busy_slots") == 0)
    wait_until(lambda: metric(slow_served, "dalle_queue_depth") == 0)
    assert len(order(page)) < 512, "what was finished stays, the empty places go"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", "11", "temperature must be 0.0 to 10.0, got 11"),
        ("num_candidates", "513", "num_candidates must be 1 to 512, got 513"),
        ("top_k", "2.5", "top_k must be a valid integer"),
        ("caption", " ", "caption must have at least 1 character"),
        ("caption", "red " * 20, "caption must be at most 8 tokens long, got 20"),
    ],
)
def test_a_refused_value_shows_its_message_at_its_field(new_page, field, value, says):
    page = new_page(errors="status of 422")
    fill(page, **{field: value})
    page.click("#generate")
    page.wait_for_selector(f"#{field}[aria-invalid]")
    assert says in page.inner_text(f"#{field}-error")
    assert f"{field}-error" in page.get_attribute(f"#{field}", "aria-describedby")
    assert page.evaluate("document.activeElement.id") == field
    page.fill(f"#{field}", "1")
    assert page.inner_text(f"#{field}-error") == "", "gone once it is being mended"


def test_the_settings_have_the_ranges_of_the_servers_schema(new_page, served):
    page = new_page()
    schema = served.get("/openapi.json").json()["components"]["schemas"]["GenerateRequest"]
    maximum = schema["properties"]["num_candidates"]["maximum"]
    assert page.get_attribute("#num_candidates", "max") == str(maximum)
    assert page.inner_text("#num_candidates-hint") == f"1 to {maximum}"
    assert page.inner_text("#top_p-hint") == "above 0 to 1"
    assert page.inner_text("#top_k-hint") == "1 or more"
    assert page.input_value("#preview_rows") == "1", "a quarter of the grid's four rows"


def test_the_settings_begin_with_the_models_own_and_one_that_is_emptied_is_sent_as_null(new_page):
    page = new_page()

    def with_defaults(route: Any) -> None:
        response = route.fetch()
        document = response.json()
        fields = document["components"]["schemas"]["GenerateRequest"]["properties"]
        fields["temperature"]["default"], fields["top_p"]["default"] = 0.7, 0.9
        route.fulfill(response=response, json=document)

    page.route("**/openapi.json", with_defaults)
    page.reload()
    page.wait_for_selector("#generate:enabled")
    assert (page.input_value("#temperature"), page.input_value("#top_p")) == ("0.7", "0.9")
    with page.expect_request("**/invocations") as sent:
        generate(page, top_p="")
    assert sent.value.post_data_json["top_p"] is None
    assert sent.value.post_data_json["temperature"] == 0.7
    assert "top_k" not in sent.value.post_data_json
    page.reload()
    page.wait_for_selector("#grid.ranked")
    assert page.input_value("#top_p") == ""


def test_a_server_that_is_gone_is_said_above_the_pictures(new_page):
    page = new_page(errors="ERR_FAILED")
    page.route("**/invocations", lambda route: route.abort())
    fill(page)
    page.click("#generate")
    page.wait_for_selector("#alert:visible")
    assert "cannot be reached" in page.inner_text("#alert")


def test_words_that_the_model_does_not_know_are_said_until_the_next_run(new_page):
    page = new_page()
    generate(page, caption="big teapot", num_candidates=1)
    assert "'teapot'; it knows" in page.inner_text("#warnings")
    generate(page, caption="big star")
    assert page.is_hidden("#warnings")
    page.go_back()
    page.wait_for_selector("#warnings:visible")


def test_the_examples_are_the_artefacts_captions_and_one_press_generates(new_page):
    page = new_page()
    page.fill("#num_candidates", "2")
    assert page.locator(".chip").all_inner_texts() == CAPTIONS
    page.click(".chip")
    page.wait_for_selector("#grid.ranked", timeout=PATIENCE)
    assert page.input_value("#caption") == CAPTIONS[0]
