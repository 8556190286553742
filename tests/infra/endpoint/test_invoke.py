"""`invoke` and batches: a real `serve` behind the runtime's protocol, pictures as files."""

import pytest
from PIL import Image

from infra.endpoint.calls import streamed
from infra.local.endpoint import RuntimeFacade
from tests.infra.aws_account import BUCKET

REALTIME = ["--mode", "realtime", "--instance-type", "ml.m5.large"]
ASYNC = ["--mode", "async", "--instance-type", "ml.g4dn.xlarge"]
ASK = ["invoke", "a red square", "--num-candidates", 3, "--num-images", 2, "--seed", 7]


@pytest.fixture
def asynchronous(endpoint, serve_url, monkeypatch):
    account = endpoint(*ASYNC)
    monkeypatch.delenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME")
    account.serve_async(f"{serve_url}/invocations")
    return account


@pytest.mark.slow
def test_images_are_written_best_first(endpoint, infra, tmp_path):
    endpoint(*REALTIME)
    result = infra(*ASK, "--out", tmp_path, "--json")
    assert result.code == 0, result.err
    assert [image["rank"] for image in result.json["images"]] == [1, 2]
    scores = [image["clip_score"] for image in result.json["images"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-1.png", "rank-2.png"]
    with Image.open(tmp_path / "rank-1.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (16, 16))
    assert result.json["seed"] == 7


@pytest.mark.slow
def test_the_same_seed_writes_the_same_files(endpoint, infra, tmp_path):
    endpoint(*REALTIME)
    infra(*ASK, "--out", tmp_path)
    result = infra(*ASK, "--out", tmp_path)
    assert result.out.count("unchanged") == 2
    assert "seed 7, 3 of 3 candidates, ranked by clip" in result.out
    result = infra("invoke", "a red square", "--seed", 8, "--out", tmp_path)
    assert "written" in result.out


@pytest.mark.slow
def test_a_format_is_asked_for_and_named(endpoint, infra, tmp_path):
    endpoint(*REALTIME)
    infra(*ASK, "--format", "webp", "--out", tmp_path)
    with Image.open(tmp_path / "rank-1.webp") as picture:
        assert picture.format == "WEBP"


@pytest.mark.slow
def test_a_stream_writes_every_candidate_and_ends_with_the_ranking(endpoint, infra, tmp_path):
    endpoint(*REALTIME)
    result = infra(*ASK, "--stream", "--out", tmp_path, "--json")
    assert result.code == 0, result.err
    names = [f"candidate-{number}.png" for number in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [ranked["rank"] for ranked in result.json["ranking"]] == [1, 2, 3]
    plain = infra(*ASK, "--out", tmp_path / "plain", "--json").json
    best = result.json["ranking"][0]["file"]
    assert (tmp_path / "plain/rank-1.png").read_bytes() == (tmp_path / best).read_bytes()
    # Its last bits depend on how many pictures CLIP read at once, which depends on time.
    score = result.json["ranking"][0]["clip_score"]
    assert plain["images"][0]["clip_score"] == pytest.approx(score, abs=1e-5)


@pytest.mark.slow
def test_openais_way_writes_the_same_images(endpoint, infra, tmp_path):
    endpoint(*REALTIME)
    result = infra(*ASK, "--openai", "--out", tmp_path / "openai", "--json")
    assert result.code == 0, result.err
    assert (result.json["mode"], result.json["seed"]) == ("openai", 7)
    infra(*ASK, "--out", tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "openai").iterdir())
    assert names == ["rank-1.png", "rank-2.png"]
    for name in names:
        assert (tmp_path / "openai" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    result = infra("invoke", "red " * 12, "--openai", "--out", tmp_path)
    assert result.code != 0
    assert "the endpoint answered 400: messages must be at most 8 tokens" in result.err


def test_openais_way_sends_nothing_in_a_dry_run(infra):
    result = infra("invoke", "a star", "--openai", "--dry-run")
    assert result.code == 0, result.err
    assert "POST /endpoints/dalle/openai/v1/chat/completions" in result.out


@pytest.mark.slow
def test_openais_way_is_for_realtime_endpoints(asynchronous, infra, tmp_path):
    result = infra(*ASK, "--openai", "--out", tmp_path)
    assert result.code != 0
    assert "--openai is for a realtime endpoint" in result.err


@pytest.mark.slow
def test_an_async_reply_comes_through_the_bucket(asynchronous, infra, tmp_path):
    result = infra(*ASK, "--out", tmp_path)
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-1.png", "rank-2.png"]
    assert "without an instance it starts one" in result.out
    assert not [key for key in asynchronous.keys_in() if "/requests/" in key], "it was sent inline"


@pytest.mark.slow
def test_an_async_request_too_large_for_the_call_goes_through_the_bucket(
    asynchronous, infra, tmp_path
):
    noise = Image.effect_noise((400, 400), 100.0)
    noise.save(tmp_path / "noise.png")
    words = ["--prime-image", tmp_path / "noise.png", "--prime-rows", 1]
    result = infra(*ASK, *words, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert len(list((tmp_path / "out").iterdir())) == 2
    (request,) = [key for key in asynchronous.keys_in() if "/requests/" in key]
    assert request.startswith("async/dalle/requests/")


@pytest.mark.slow
def test_each_async_reply_has_a_file_of_its_own(asynchronous, infra, tmp_path):
    for _ in range(2):
        assert infra(*ASK, "--out", tmp_path).code == 0
    replies = [key for key in asynchronous.keys_in() if "/replies/" in key]
    assert len(replies) == 2
    assert all(len(key.rpartition("/")[2]) <= 32 for key in replies)


@pytest.mark.slow
def test_words_that_the_model_does_not_know_are_told(endpoint, infra, tmp_path):
    endpoint(*REALTIME)
    for words in ([], ["--stream"], ["--openai"]):
        result = infra("invoke", "a red zeppelin", *words, "--out", tmp_path, "--json")
        assert result.code == 0, result.err
        assert any("zeppelin" in warning for warning in result.json["warnings"])
        assert "warning: " in result.err


@pytest.mark.slow
def test_what_an_async_endpoint_could_not_do_is_reported(asynchronous, infra, tmp_path):
    result = infra("invoke", "a red square", "--num-candidates", 513, "--out", tmp_path)
    assert result.code == 1
    assert "could not answer: num_candidates must be 1 to 512, got 513" in result.err


@pytest.mark.slow
def test_an_async_reply_that_does_not_come_is_given_up(asynchronous, infra):
    answer = asynchronous.runtime

    def lose(path, headers, body):
        found = answer(path, headers, body)
        for key in asynchronous.keys_in():
            if "/replies/" in key:
                asynchronous.client("s3").delete_object(Bucket=BUCKET, Key=key)
        return found

    asynchronous.runtime = lose
    result = infra(*ASK, "--timeout", 0)
    assert result.code == 1
    assert "no reply within 0 s; it will be at s3://" in result.err


@pytest.mark.slow
def test_an_async_endpoint_does_not_stream(asynchronous, infra):
    result = infra(*ASK, "--stream")
    assert result.code == 1
    assert "endpoint dalle is async, and only a realtime one can stream" in result.err


@pytest.mark.slow
def test_what_the_server_refuses_is_reported_in_its_words(endpoint, infra):
    endpoint(*REALTIME)
    result = infra("invoke", "a red square", "--num-candidates", 513)
    assert result.code == 1
    assert result.err == "the endpoint answered 422: num_candidates must be 1 to 512, got 513\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["", "--seed", 1], "caption"),
        (["x", "--temperature", 11], "temperature must be 0.0 to 10.0, got 11.0"),
        (["x", "--num-images", 9, "--num-candidates", 3], "num_images must be 1 to num_candidates"),
        (["x", "--prime-rows", 2], "prime_image and prime_rows go together"),
        (["x", "--prime-image", "/nowhere.png", "--prime-rows", 2], "cannot read /nowhere.png"),
    ],
)
def test_a_wrong_request_is_reported_before_anything_is_sent(account, infra, words, says):
    result = infra("invoke", *words)
    assert result.code == 1
    assert says in result.err
    assert account.requests.total() == 0


def test_an_endpoint_that_is_not_there_is_reported(account, infra):
    result = infra("invoke", "a red square", "--endpoint", "stars")
    assert result.code == 1
    assert "there is no endpoint dalle--stars; `python -m infra status` lists" in result.err


@pytest.mark.slow
def test_a_payload_larger_than_the_endpoint_takes_is_refused_by_number(endpoint, infra, tmp_path):
    endpoint("--mode", "serverless")
    (tmp_path / "large.png").write_bytes(b"x" * 4_000_000)
    result = infra("invoke", "x", "--prime-image", tmp_path / "large.png", "--prime-rows", 1)
    assert result.code == 1
    assert "a request to a serverless endpoint has at most 4,000,000 bytes, got 5,333" in result.err


@pytest.mark.slow
def test_a_local_endpoint_needs_no_account(account, infra, serve_url, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    with RuntimeFacade({"dalle": int(serve_url.rpartition(":")[2])}) as facade:
        port = facade.url.rpartition(":")[2]
        result = infra(*ASK, "--local", "--port", port, "--out", tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "rank-1.png").exists()
    assert account.requests.total() == 0


def test_a_stream_shows_different_images_as_the_reply_does_and_counts_their_copies(
    account, infra, serve_url, tmp_path
):
    with RuntimeFacade({"dalle": int(serve_url.rpartition(":")[2])}) as facade:
        words = [*ASK, "--temperature", 0, "--local", "--port", facade.url.rpartition(":")[2]]
        for more, first in ([], "rank-1.png"), (["--stream"], "candidate-0.png"):
            result = infra(*words, *more, "--out", tmp_path)
            assert result.code == 0, result.err
            table = [line.split() for line in result.out.splitlines() if line[0].isdigit()]
            ((rank, _, _, copies, file, *_),) = table
            assert (rank, copies, file) == ("1", "3", str(tmp_path / first))
    assert len(list(tmp_path.glob("candidate-*.png"))) == 3


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b'{"a":1}\n{"b":', b"2}\n"], [b'{"a":1}', b'{"b":2}']),
        ([b"\n\n", b"x"], [b"x"]),
        ([], []),
    ],
)
def test_lines_are_put_together_from_parts_that_are_cut_anywhere(chunks, lines):
    assert list(streamed.lines(iter(chunks))) == lines


# --- batches

BATCH = ["--mode", "batch", "--instance-type", "ml.g4dn.xlarge"]


@pytest.fixture
def batch(account, infra, serve_url, tmp_path):
    """A function: captions -> what `deploy --mode batch` says of them."""
    infra("bootstrap")
    account.put_image()
    account.serve_batches(f"{serve_url}/invocations")
    model = f"s3://{BUCKET}/models/job/output/model.tar.gz"

    def run(captions: str, *words: object):
        (tmp_path / "captions.txt").write_text(captions, "utf-8")
        files = ["--captions", tmp_path / "captions.txt", "--out", tmp_path / "out"]
        return infra("deploy", *BATCH, "--model", model, *files, *words)

    return run


@pytest.mark.slow
def test_a_batch_generates_images_for_every_caption(account, batch, tmp_path):
    result = batch("a red square\n\na blue star\n")
    assert result.code == 0, result.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{line:04}-rank-{rank}.png" for line in (1, 2) for rank in (1, 2, 3, 4)]
    (job,) = account.bodies("CreateTransformJob")
    assert job["BatchStrategy"] == "SingleRecord"
    assert job["TransformInput"]["SplitType"] == job["TransformOutput"]["AssembleWith"] == "Line"
    resources = job["TransformResources"]
    assert resources["TransformAmiVersion"] == "al2-ami-sagemaker-batch-gpu-535"
    assert account.names("endpoints") == []


@pytest.mark.slow
def test_a_second_batch_of_the_same_captions_runs_no_job(account, batch):
    batch("a red square")
    result = batch("a red square")
    assert result.code == 0
    assert account.requests["CreateTransformJob"] == 1
    assert "already there" in result.out


@pytest.mark.slow
def test_an_error_in_one_caption_leaves_the_others_unaffected(batch, tmp_path):
    result = batch("a red square\n" + "very " * 40 + "long\na blue star\n", "--json")
    assert result.code == 0, result.err
    assert (result.json["pictures"], result.json["refused"]) == (8, 1)
    assert "caption 2" in result.err
    assert not (tmp_path / "out" / "0002-rank-1.png").exists()


def test_a_batch_needs_captions(account, infra, tmp_path):
    assert "--mode batch needs --captions" in infra("deploy", "--mode", "batch").err
    result = infra("deploy", "--mode", "async", "--captions", "x.txt")
    assert "--captions is for --mode batch alone" in result.err
    assert account.requests.total() == 0


@pytest.mark.parametrize(
    ("captions", "says"), [("\n \n", "holds no captions"), (None, "cannot be read")]
)
def test_a_file_without_captions_is_refused(account, infra, batch, tmp_path, captions, says):
    result = (
        batch(captions)
        if captions
        else infra(
            "deploy", *BATCH, "--model", "s3://b/m.tar.gz", "--captions", tmp_path / "none.txt"
        )
    )
    assert result.code == 1
    assert says in result.err
    assert account.requests["CreateModel"] == 0


@pytest.mark.slow
def test_a_reply_that_has_no_images_is_reported(endpoint, infra, monkeypatch):
    account = endpoint(*REALTIME)
    monkeypatch.delenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME")
    account.runtime = lambda path, headers, body: (
        200,
        [("Content-Type", "application/json")],
        b'{"predictions": []}',
    )
    result = infra(*ASK)
    assert result.code == 1
    assert "the endpoint's reply has no images" in result.err
