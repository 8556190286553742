"""The facade's path for OpenAI's clients: bearer tokens, and replies as the container's."""

import base64
from datetime import UTC, datetime, timedelta

import pytest

from infra.local.endpoint import RuntimeFacade
from infra.local.openai import token_fault

pytestmark = pytest.mark.slow  # the clients are

MESSAGES = [{"role": "user", "content": "a red square"}]
CHAT = b'{"choices": [], "id": "1", "object": "chat.completion", "created": 0, "model": "m"}'


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")


@pytest.fixture
def generate_token():
    """The SageMaker SDK's own function; the import takes a while."""
    from sagemaker.core import token_generator

    return token_generator.generate_token


@pytest.fixture
def openai():
    """OpenAI's own client; the import takes a while."""
    import openai

    return openai


@pytest.fixture
def client_of(openai, generate_token):
    """A function: the facade -> OpenAI's client of an endpoint behind it."""

    def make(facade, token: str | None = None, name: str = "dalle"):
        return openai.OpenAI(
            base_url=f"{facade.url}/endpoints/{name}/openai/v1",
            api_key=token or generate_token(region="us-east-1"),
            max_retries=0,
            timeout=60,
        )

    return make


def token_of(text: str) -> str:
    return "sagemaker-api-key-" + base64.b64encode(text.encode()).decode()


def ask(client, **fields):
    with client:
        return client.chat.completions.create(model="", messages=MESSAGES, **fields)


def test_a_chat_reaches_the_container_without_its_token(make_endpoint, client_of):
    container, _, facade = make_endpoint(lambda h: h.reply(CHAT, Content_Type="application/json"))
    assert ask(client_of(facade)).id == "1"
    assert container.paths == ["/v1/chat/completions"]
    ((headers, body),) = container.requests
    assert {name.lower() for name in headers} == {
        "host",
        "accept",
        "content-type",
        "content-length",
    }
    assert b"a red square" in body


@pytest.mark.parametrize(("status", "error"), [(400, "BadRequestError"), (429, "RateLimitError")])
def test_an_error_of_the_container_comes_back_as_it_is(
    make_endpoint, client_of, openai, status, error
):
    body = b'{"error": {"message": "n is wrong", "type": "t", "param": "n", "code": "c"}}'
    _, _, facade = make_endpoint(lambda h: h.reply(body, status, Content_Type="application/json"))
    with pytest.raises(getattr(openai, error), match="n is wrong") as raised:
        ask(client_of(facade))
    assert (raised.value.param, raised.value.code) == ("n", "c")


@pytest.mark.parametrize(
    "token",
    ["any", "sagemaker-api-key-!", token_of("sagemaker.amazonaws.com/?Action=CallWithBearerToken")],
)
def test_a_token_that_is_none_is_a_permission_error(make_endpoint, client_of, openai, token):
    container, _, facade = make_endpoint(lambda h: h.reply(CHAT))
    with pytest.raises(openai.PermissionDeniedError) as raised:
        ask(client_of(facade, token))
    assert "the bearer token" in raised.value.response.text
    assert container.requests == []


def test_an_endpoint_that_is_not_there_is_named(make_endpoint, client_of, openai):
    _, _, facade = make_endpoint(lambda h: h.reply(CHAT))
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client_of(facade, name="other"))
    assert "Endpoint other of account" in raised.value.response.text


def test_other_paths_of_openais_api_are_none_of_an_endpoint(make_endpoint, client_of, openai):
    _, _, facade = make_endpoint(lambda h: h.reply(CHAT))
    with client_of(facade) as client, pytest.raises(openai.NotFoundError):
        client.images.generate(model="", prompt="a")


def test_a_token_is_valid_for_as_long_as_it_says(generate_token):
    token = f"Bearer {generate_token(region='us-east-1', expiry=timedelta(minutes=5))}"
    now = datetime.now(UTC)
    assert token_fault(token, now) is None
    assert token_fault(token, now + timedelta(minutes=4)) is None
    assert token_fault(token, now + timedelta(minutes=6)) == "the bearer token has expired"


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("Action=Other&{0}", "not for CallWithBearerToken"),
        ("{0}", "has no Action"),
        ("Action=CallWithBearerToken&{0}&X-Amz-Expires=x", None),
    ],
)
def test_a_token_for_something_else_is_refused(query, says):
    rest = "X-Amz-Credential=a&X-Amz-Date=20261130T000000Z&X-Amz-Expires=5&X-Amz-Signature=b"
    token = token_of("sagemaker.amazonaws.com/?" + query.format(rest))
    fault = token_fault(f"Bearer {token}", datetime(2026, 11, 30, tzinfo=UTC))
    assert fault is None if says is None else says in fault


@pytest.mark.parametrize("header", [None, "", "Bearer ", "Basic YTpi"])
def test_without_a_token_one_is_asked_for(header):
    assert token_fault(header) == "Missing Authentication Token"


def test_a_real_serve_answers_chats_plain_and_streamed(serve_url, client_of, openai):
    extra = {"seed": 7, "num_candidates": 2}
    with RuntimeFacade({"dalle": int(serve_url.rpartition(":")[2])}) as facade:
        reply = ask(client_of(facade), extra_body=extra)
        with client_of(facade) as client:
            stream = client.chat.completions.create(
                model="", messages=MESSAGES, extra_body=extra, stream=True
            )
            parts = [chunk.choices[0].delta.content for chunk in stream]
        with pytest.raises(openai.BadRequestError, match="n must be 1 to 32, got 33"):
            ask(client_of(facade), n=33)
    (streamed,) = [part for part in parts if part]
    assert reply.choices[0].message.content[0]["image_url"] == streamed[0]["image_url"]
