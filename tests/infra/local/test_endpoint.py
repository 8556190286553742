"""The runtime facade between boto3's own client and a container: plain replies. Streams:
test_endpoint_stream.py; the image behind it: test_image_endpoint.py."""

import threading

import pytest
from botocore.exceptions import ClientError

from infra.local.endpoint import Limits
from tests.infra.endpoint_fixtures import client


def model_error(runtime, **words):
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        runtime.invoke_endpoint(EndpointName="dalle", Body=b"{}", **words)
    return caught.value.response


def test_the_limits_are_the_platforms():
    assert Limits() == Limits(
        reply_seconds=60,
        stream_seconds=8 * 60,
        request_bytes=25 * 1024 * 1024,
        reply_bytes=25 * 1024 * 1024,
        attribute_characters=1024,
    )


def test_body_and_media_types_pass_untouched_in_both_directions(make_endpoint):
    container, runtime, _ = make_endpoint(lambda h: h.reply(b"\x89PNG\0", Content_Type="image/png"))
    reply = runtime.invoke_endpoint(
        EndpointName="dalle", Body=b"\0\xff", ContentType="text/plain", Accept="image/png"
    )
    ((headers, body),) = container.requests
    assert (headers["Content-Type"], headers["Accept"], body) == (
        "text/plain",
        "image/png",
        b"\0\xff",
    )
    assert reply["Body"].read() == b"\x89PNG\0"
    assert reply["ContentType"] == "image/png"
    assert reply["InvokedProductionVariant"] == "AllTraffic"
    assert reply["ResponseMetadata"]["RequestId"]


def test_the_client_finds_it_through_the_environment(make_endpoint, monkeypatch):
    _, _, facade = make_endpoint(lambda h: h.reply(b"here"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", facade.url)
    runtime = client(None)
    reply = runtime.invoke_endpoint(EndpointName="dalle", Body=b"")
    assert reply["Body"].read() == b"here"
    runtime.close()


def test_of_the_requests_headers_only_the_platforms_own_reach_the_container(make_endpoint):
    container, runtime, _ = make_endpoint(lambda h: h.reply(b""))
    runtime.meta.events.register(
        "before-sign.sagemaker-runtime",
        lambda request, **_: request.headers.add_header("X-Trace", "1"),
    )
    runtime.invoke_endpoint(
        EndpointName="dalle",
        Body=b"",
        CustomAttributes="trace=1",
        InferenceId="id-1",
        SessionId="NEW_SESSION",
    )
    ((headers, _),) = container.requests
    own = {name.lower(): value for name, value in headers.items()}
    assert own.pop("x-amzn-sagemaker-custom-attributes") == "trace=1"
    assert own.pop("x-amzn-sagemaker-inference-id") == "id-1"
    assert own.pop("x-amzn-sagemaker-session-id") == "NEW_SESSION"
    assert set(own) <= {"host", "content-length", "content-type", "accept"}


def test_of_the_replys_headers_only_the_platforms_own_reach_the_client(make_endpoint):
    headers = {
        "X_Amzn_SageMaker_Custom_Attributes": "seed=7",
        "X_Amzn_SageMaker_New_Session_Id": "abc; Expires=2026-11-22T12:00:00Z",
        "X_Dalle_Seed": "7",
        "Retry_After": "3",
    }
    _, runtime, _ = make_endpoint(lambda h: h.reply(b"{}", **headers))
    reply = runtime.invoke_endpoint(EndpointName="dalle", Body=b"")
    assert reply["CustomAttributes"] == "seed=7"
    assert reply["NewSessionId"].startswith("abc; ")
    seen = reply["ResponseMetadata"]["HTTPHeaders"]
    assert {"x-dalle-seed", "retry-after"} & set(seen) == set()


def test_without_custom_attributes_of_the_containers_there_are_none(make_endpoint):
    _, runtime, _ = make_endpoint(lambda h: h.reply(b"{}"))
    reply = runtime.invoke_endpoint(EndpointName="dalle", Body=b"", CustomAttributes="trace=1")
    assert "CustomAttributes" not in reply


@pytest.mark.parametrize("attributes", ["a" * 1025, "caf\xe9"])
def test_custom_attributes_that_the_platform_would_not_carry_are_refused(make_endpoint, attributes):
    container, runtime, _ = make_endpoint(lambda h: h.reply(b"{}"))
    with pytest.raises(ClientError, match="at most 1024 visible ASCII characters") as caught:
        runtime.invoke_endpoint(EndpointName="dalle", Body=b"", CustomAttributes=attributes)
    assert caught.value.response["Error"]["Code"] == "ValidationError"
    assert container.requests == []


def test_custom_attributes_of_the_container_that_are_too_long_are_its_error(make_endpoint):
    too_long = {"X_Amzn_SageMaker_Custom_Attributes": "a" * 1025}
    _, runtime, _ = make_endpoint(lambda h: h.reply(b"{}", **too_long))
    assert "at most 1024" in model_error(runtime)["OriginalMessage"]


@pytest.mark.parametrize(("status", "whose"), [(400, "client"), (429, "client"), (503, "server")])
def test_an_error_of_the_containers_is_a_model_error_with_its_status_and_words(
    make_endpoint, status, whose
):
    body = b'{"error": {"code": "bad_request", "message": "no caption"}}'
    _, runtime, _ = make_endpoint(lambda h: h.reply(body, status, Retry_After="3"))
    error = model_error(runtime)
    assert error["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert error["OriginalStatusCode"] == status
    assert error["OriginalMessage"] == body.decode()
    assert error["LogStreamArn"].endswith("/aws/sagemaker/Endpoints/dalle")
    assert f"Received {whose} error ({status}) from primary" in error["Error"]["Message"]


def test_an_endpoint_that_is_not_there_is_named(make_endpoint):
    _, runtime, _ = make_endpoint(lambda h: h.reply(b"{}"))
    with pytest.raises(ClientError, match="Endpoint other of account .* not found") as caught:
        runtime.invoke_endpoint(EndpointName="other", Body=b"")
    assert caught.value.response["Error"]["Code"] == "ValidationError"


def test_a_variant_that_is_not_there_is_named(make_endpoint):
    container, runtime, _ = make_endpoint(lambda h: h.reply(b"{}"))
    runtime.invoke_endpoint(EndpointName="dalle", Body=b"", TargetVariant="AllTraffic")
    with pytest.raises(ClientError, match="Variant blue of dalle not found"):
        runtime.invoke_endpoint(EndpointName="dalle", Body=b"", TargetVariant="blue")
    assert len(container.requests) == 1


def test_an_operation_that_only_the_real_service_has_is_refused(make_endpoint):
    _, runtime, _ = make_endpoint(lambda h: h.reply(b"{}"))
    with pytest.raises(ClientError, match="UnknownOperationException"):
        runtime.invoke_endpoint_async(EndpointName="dalle", InputLocation="s3://bucket/key")


def test_a_request_over_the_limit_never_reaches_the_container(make_endpoint):
    container, runtime, _ = make_endpoint(lambda h: h.reply(b"{}"), request_bytes=1_000_000)
    runtime.invoke_endpoint(EndpointName="dalle", Body=b"x" * 1_000_000)
    with pytest.raises(ClientError, match="HTTP content length exceeded 1000000 bytes") as caught:
        runtime.invoke_endpoint(EndpointName="dalle", Body=b"x" * 8_000_000)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 413
    assert len(container.requests) == 1


def test_a_reply_over_the_limit_is_the_containers_error(make_endpoint):
    _, runtime, _ = make_endpoint(lambda h: h.reply(b"x" * 1001), reply_bytes=1000)
    assert "larger than 1000 bytes" in model_error(runtime)["OriginalMessage"]


def test_a_reply_that_takes_too_long_is_a_model_error_without_a_status(make_endpoint):
    _, runtime, _ = make_endpoint(lambda h: h.wait(), reply_seconds=0.2)
    error = model_error(runtime)
    assert error["OriginalStatusCode"] == 0
    assert "timed out while waiting for a response from container" in error["OriginalMessage"]


def test_the_time_is_counted_to_the_end_of_the_body_not_to_its_beginning(make_endpoint):
    def drip(handler):
        handler.begin(Transfer_Encoding="chunked")
        handler.chunk(b"a")
        handler.wait()

    _, runtime, _ = make_endpoint(drip, reply_seconds=0.2)
    assert "timed out" in model_error(runtime)["OriginalMessage"]


def test_a_body_that_comes_drop_by_drop_does_not_put_the_end_off(make_endpoint):
    def drip(handler):
        handler.begin(Transfer_Encoding="chunked")
        for _ in range(100):
            handler.chunk(b"drop")
            container.free.wait(0.05)
        handler.chunk(b"")

    container, runtime, _ = make_endpoint(drip, reply_seconds=0.3)
    assert "timed out" in model_error(runtime)["OriginalMessage"]


def test_a_container_that_dies_in_mid_reply_is_a_model_error(make_endpoint):
    _, runtime, _ = make_endpoint(lambda h: (h.begin(Content_Length="100"), h.wfile.write(b"half")))
    error = model_error(runtime)
    assert error["OriginalStatusCode"] == 0
    assert "the model process exited" in error["OriginalMessage"]


def test_a_container_that_is_not_there_is_a_model_error(make_endpoint):
    container, runtime, _ = make_endpoint(lambda h: h.reply(b"{}"))
    container.stop()
    assert "the model process exited" in model_error(runtime)["OriginalMessage"]


def test_requests_are_answered_side_by_side(make_endpoint):
    first = threading.Event()

    def answer(handler):
        if handler.headers["X-Amzn-SageMaker-Inference-Id"] == "slow":
            first.set()
            handler.wait()
        handler.reply(b"done")

    container, runtime, _ = make_endpoint(answer)
    slow = threading.Thread(
        target=lambda: runtime.invoke_endpoint(EndpointName="dalle", Body=b"", InferenceId="slow")
    )
    slow.start()
    assert first.wait(60)
    reply = runtime.invoke_endpoint(EndpointName="dalle", Body=b"", InferenceId="quick")
    assert reply["Body"].read() == b"done"
    container.free.set()
    slow.join()
