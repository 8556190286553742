"""The dated price table, and the Pricing API read over HTTP from a server that pages as it does."""

import datetime
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dalle.errors import PriceMissing, UserError
from infra.__main__ import main
from infra.aws.limits import check_instance_type
from infra.cost.prices import load_prices
from infra.cost.pricing_api import request_for
from infra.endpoint.options import DEFAULT_INSTANCE
from infra.jobs.training_job import TrainingRun

# us-east-1, as the contract has them: USD per hour, date, confidence.
HOSTING = {
    "ml.t2.medium": (0.056, None, "B"),
    "ml.m5.large": (0.115, None, "C"),
    "ml.m5.xlarge": (0.23, "2026-09-28", "B"),
    "ml.m5.2xlarge": (0.461, "2026-09-28", "B"),
    "ml.c5.large": (0.102, None, "B"),
    "ml.c5.xlarge": (0.204, None, "B"),
    "ml.c5.2xlarge": (0.408, None, "C"),
    "ml.c6i.large": (0.102, None, "low"),
    "ml.c6i.xlarge": (0.204, None, "low"),
    "ml.c7i.large": (0.11, "2026", "C"),
    "ml.c7i.xlarge": (0.21, "2026", "C"),
    "ml.m7i.large": (0.12, "2026", "C"),
    "ml.g4dn.xlarge": (0.7364, None, "C"),
    "ml.g5.xlarge": (1.408, "2026-07-30", "B"),
    "ml.g5.2xlarge": (1.515, "2026", "C"),
    "ml.g6.xlarge": (1.1267, "2026-07-30", "B"),
    "ml.g6.2xlarge": (1.222, "2026", "C"),
    "ml.g6.12xlarge": (5.752, "2026-07-30", "B"),
    "ml.p3.2xlarge": (3.825, None, "C"),
    "ml.p4d.24xlarge": (25.2513, "2026", "C"),
    "ml.p5.48xlarge": (63.296, "2026", "C"),
}


def product(usage, usd, *, name="", unit="Hrs", sku="SKU1", offers=1, **attributes):
    """One entry of PriceList: a text of JSON, shaped as the API shapes it."""
    dimensions = {
        f"{sku}.JRTCKXETXF.6YS6EN2CT7.{number}": {
            "unit": unit,
            "beginRange": str(number * 1000),
            "endRange": "Inf",
            "description": f"${price} per {unit}",
            "rateCode": f"{sku}.JRTCKXETXF.6YS6EN2CT7",
            "pricePerUnit": {"USD": f"{price:.10f}"},
        }
        for number, price in enumerate(usd if isinstance(usd, list) else [usd])
    }
    term = {
        "offerTermCode": "JRTCKXETXF",
        "sku": sku,
        "effectiveDate": "2026-11-01T00:00:00Z",
        "priceDimensions": dimensions,
    }
    return json.dumps(
        {
            "product": {
                "productFamily": "ML Instance",
                "sku": sku,
                "attributes": {
                    "instanceName": name,
                    "usagetype": usage,
                    "regionCode": "us-east-1",
                    "servicecode": "AmazonSageMaker",
                    **attributes,
                },
            },
            "serviceCode": "AmazonSageMaker",
            "terms": {"OnDemand": {f"{sku}.JRTCKXETXF": term} if offers else {}},
            "version": "20261101000000",
            "publicationDate": "2026-11-01T00:00:00Z",
        }
    )


G5 = {"vCpu": "4", "memory": "16 GiB", "gpu": "1", "physicalGpu": "A10G"}
PRODUCTS = {
    "ml.g5.xlarge": [
        product("USE1-Train:ml.g5.xlarge", 1.5, name="ml.g5.xlarge", sku="TRAIN", **G5),
        product("USE1-Host:ml.g5.xlarge", 0.0, name="ml.g5.xlarge", sku="FREE", **G5),
        product("USE1-ReservedHost:ml.g5.xlarge", 0.9, name="ml.g5.xlarge", sku="SAVE", **G5),
        product("USE1-Host:ml.g5.xlarge-Savings", 0.8, name="ml.g5.xlarge", sku="PLAN", **G5),
        product("USE1-Host:ml.g5.xlarge", 1.41, name="ml.g5.xlarge", sku="HOST", **G5),
        product("USE1-AsyncInf:ml.g5.xlarge", 1.42, name="ml.g5.xlarge", sku="ASYNC", **G5),
    ],
    "ml.new.large": [product("USE1-Host:ml.new.large", 0.3, name="ml.new.large")],
    "ml.two.large": [
        product("USE1-Host:ml.two.large", 0.3, sku="ONE"),
        product("USE1-Host:ml.two.large", 0.4, sku="TWO"),
    ],
    "ML Serverless": [
        product("USE1-ServerlessInf:Mem-6GB", [0.0, 0.00018], unit="Seconds", sku="S6"),
        product("USE1-ServerlessInf:Mem-1GB", [0.0, 0.00003], unit="Seconds", sku="S1"),
        product("USE1-ServerlessInf:ProvisionedConcurrency-1GB", 0.00001, unit="Seconds"),
    ],
    "General Purpose-Hosting": [product("USE1-Host:VolumeUsage.gp2", 0.15, unit="GB-Mo")],
    "Serverless": [
        product("Lambda-GB-Second", [0.000016, 0.000015], unit="Lambda-GB-Second", sku="L1"),
        product("Lambda-GB-Second-ARM", 0.000013, unit="Lambda-GB-Second", sku="L2"),
        product("Request", 0.00000021, unit="Requests", sku="L3"),
        product("Request-ARM", 0.0000001, unit="Requests", sku="L4"),
    ],
}


class Pricing(ThreadingHTTPServer):
    """requests: (target, body) of each one that came."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), PricingApi)
        self.requests: list[tuple[str, dict[str, Any]]] = []


class PricingApi(BaseHTTPRequestHandler):
    """GetProducts, two products a page."""

    protocol_version = "HTTP/1.1"
    server: Pricing

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers["X-Amz-Target"], body))
        filters = {each["Field"]: each["Value"] for each in body["Filters"]}
        key = next(value for field, value in filters.items() if field != "regionCode")
        found = PRODUCTS.get(key, [])
        begin = int(body.get("NextToken", "0"))
        answer = {"FormatVersion": "aws_v1", "PriceList": found[begin : begin + 2]}
        if begin + 2 < len(found):
            answer["NextToken"] = str(begin + 2)
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        """Quiet."""


@contextmanager
def pricing_api():
    server = Pricing()
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def api(monkeypatch):
    """The Pricing API's requests; commands of this process go to it."""
    with pricing_api() as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        yield server.requests


def refresh(tmp_path: Path, *words: str) -> tuple[int, Path]:
    out = tmp_path / "prices.json"
    return main(["prices", "refresh", "--out", str(out), *words]), out


@pytest.mark.parametrize(("instance_type", "expected"), HOSTING.items())
def test_the_hosting_prices_are_those_that_were_gathered(instance_type, expected):
    price = load_prices().hourly(instance_type, region="us-east-1")
    assert (price.usd, price.date, price.confidence) == expected
    assert (price.unit, price.component) == ("hour", "Hosting")
    assert price.source


@pytest.mark.parametrize(
    ("item", "component", "usd", "unit", "confidence"),
    [
        ("serverless", "compute", 0.00002, "GB-second", "B"),
        ("serverless", "data", 0.016, "GB", "B"),
        ("lambda", "compute", 0.0000166667, "GB-second", "C"),
        ("lambda", "requests", 0.2, "million requests", "B"),
        ("endpoint", "volume", 0.14, "GB-month", "C"),
        ("endpoint", "data", 0.02, "GB", "C"),
    ],
)
def test_what_is_not_an_instance_has_its_price_too(item, component, usd, unit, confidence):
    price = load_prices().price(item, component)
    assert (price.usd, price.unit, price.confidence) == (usd, unit, confidence)


def test_every_instance_type_with_a_price_is_described():
    table = load_prices()
    for each in table.prices:
        if each.item.startswith("ml."):
            known = table.instance_type(each.item)
            is_gpu = each.item.split(".")[1][0] in "gp"
            assert (known.gpus > 0) == is_gpu, each.item


@pytest.mark.parametrize(
    ("region", "component", "says"),
    [
        ("us-east-1", "Hosting", r"ml.g7.xlarge \(Hosting\) in us-east-1"),
        ("eu-west-1", "Training", r"--type ml.g7.xlarge --component Training --region eu-west-1"),
    ],
)
def test_a_price_that_is_missing_is_named_with_how_to_read_it(region, component, says):
    with pytest.raises(PriceMissing, match=says):
        load_prices().hourly("ml.g7.xlarge", region=region, component=component)


REGIONS = ("us-east-1", "us-east-2", "us-west-2", "eu-west-1", "eu-central-1", "ap-northeast-1")


@pytest.mark.parametrize("region", REGIONS)
def test_what_the_commands_offer_by_default_has_a_price_with_date_and_source(region):
    kinds = {"realtime": "Hosting", "async": "Hosting", "batch": "BatchTransform"}
    wanted = [(str(DEFAULT_INSTANCE[mode]), component) for mode, component in kinds.items()]
    wanted.append((TrainingRun("p", "i", "r", "b", {}).instance_type, "Training"))
    wanted += [("serverless", "compute"), ("serverless", "data")]
    wanted += [("endpoint", "volume"), ("endpoint", "data")]
    for item, component in wanted:
        price = load_prices().price(item, component, region)
        assert price.source
        assert price.date or region == "us-east-1", "what came with the first table may be undated"


@pytest.mark.parametrize("family", ["g6", "g6e", "p5", "p6-b200", "c7i"])
def test_current_families_on_which_the_image_runs_have_a_price(family):
    items = {price.item for price in load_prices().prices if price.component == "Hosting"}
    found = [item for item in items if item.split(".")[1] == family]
    assert found
    assert not [problem for item in found for problem in check_instance_type(item)]


def test_of_several_gpus_the_single_one_is_known():
    table = load_prices()
    assert table.single_gpu("ml.p5.48xlarge") == "ml.p5.4xlarge"
    assert table.single_gpu("ml.g6.12xlarge") == "ml.g6.xlarge"
    assert table.single_gpu("ml.p4d.24xlarge") == "ml.p4d.24xlarge", "no smaller one has its GPU"
    assert table.single_gpu("ml.c7i.large") == "ml.c7i.large"


def test_a_price_of_one_region_is_not_taken_for_another():
    with pytest.raises(PriceMissing, match="known of it: Hosting in us-east-1"):
        load_prices().hourly("ml.m5.2xlarge", region="eu-west-1")


def test_an_item_that_is_not_sold_is_reported_without_advice_to_refresh():
    with pytest.raises(PriceMissing, match="ml.t3.medium .Hosting. .* is not offered") as caught:
        load_prices().hourly("ml.t3.medium")
    assert "refresh" not in str(caught.value)


def test_show_prints_the_date_the_source_and_the_confidence_beside_every_figure(capsys):
    assert main(["prices", "show", "--type", "ml.m5.xlarge"]) == 0
    head, line, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[3:8] == ["USD", "per", "USD/month", "date", "confidence"]
    assert line.split()[3:8] == ["0.23", "hour", "167.90", "2026-09-28", "B"]
    assert "SKU JDZQJFUVUR8SUWHS" in line


def test_without_an_action_all_prices_are_shown(capsys):
    assert main(["prices"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(load_prices().prices)


def test_show_fails_for_what_has_no_price(capsys):
    assert main(["prices", "show", "--type", "ml.none.large"]) == 1
    assert "ml.none.large" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "is no price table"),
        ('{"about": "", "gathered": "2026-11-22", "prices": [{"item": "x"}]}', "is no price table"),
        (b"\xff", "is no price table"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, text, says):
    path = tmp_path / "p.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        load_prices(path)


@pytest.mark.parametrize("usd", ["0", "-1", "NaN"])
def test_a_price_of_nothing_is_no_price(tmp_path, usd):
    text = json.dumps(load_prices().model_dump()).replace('"usd": 0.056', f'"usd": {usd}')
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match="prices.0.usd"):
        load_prices(tmp_path / "p.json")


def test_two_prices_for_one_thing_are_refused(tmp_path):
    table = load_prices().model_dump()
    table["prices"].append(table["prices"][0])
    (tmp_path / "p.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="two prices each of ml.t2.medium Hosting us-east-1"):
        load_prices(tmp_path / "p.json")


def test_refresh_follows_every_page_and_asks_for_one_type_and_region(api, tmp_path):
    assert refresh(tmp_path, "--type", "ml.g5.xlarge")[0] == 0
    assert [target for target, _ in api] == ["AWSPriceListService.GetProducts"] * 3
    assert [body.get("NextToken") for _, body in api] == [None, "2", "4"]
    assert api[0][1]["ServiceCode"] == "AmazonSageMaker"
    assert {(each["Field"], each["Value"]) for each in api[0][1]["Filters"]} == {
        ("instanceName", "ml.g5.xlarge"),
        ("regionCode", "us-east-1"),
    }


def test_refresh_leaves_out_what_costs_nothing_is_reserved_or_of_another_component(api, tmp_path):
    _, out = refresh(tmp_path, "--type", "ml.g5.xlarge")
    table = load_prices(out)
    price = table.hourly("ml.g5.xlarge")
    assert (price.usd, price.confidence) == (1.41, "A")
    assert "SKU HOST, USE1-Host:ml.g5.xlarge, effective 2026-11-01" in price.source
    assert table.price("ml.g5.xlarge", "AsyncInference").usd == 1.42
    assert table.price("ml.g5.xlarge", "Training").usd == 1.408, "it was not asked for"


def test_refresh_reads_the_component_that_is_asked_for(api, tmp_path):
    _, out = refresh(tmp_path, "--type", "ml.g5.xlarge", "--component", "Training")
    assert load_prices(out).price("ml.g5.xlarge", "Training").usd == 1.5
    assert load_prices(out).hourly("ml.g5.xlarge").usd == 1.408


def test_what_was_read_stands_in_a_table_with_all_the_rest(api, tmp_path, capsys):
    status, out = refresh(tmp_path, "--type", "ml.g5.xlarge")
    assert status == 0
    old, new = load_prices(), load_prices(out)
    assert new.hourly("ml.m5.xlarge") == old.hourly("ml.m5.xlarge")
    today = datetime.datetime.now(datetime.UTC).date()
    read = datetime.date.fromisoformat(new.hourly("ml.g5.xlarge").date)
    assert today - read <= datetime.timedelta(days=1), "midnight may have passed"
    assert f"1.41  hour  1,029.30   {read}" in capsys.readouterr().out


def test_the_bundled_table_is_never_written(api, tmp_path):
    before = load_prices()
    refresh(tmp_path, "--type", "ml.g5.xlarge")
    assert load_prices() == before


def test_serverless_lambda_and_volumes_are_read_without_their_free_tiers(api, tmp_path):
    words = ["--type", "serverless", "--type", "lambda", "--type", "endpoint"]
    _, out = refresh(tmp_path, *words)
    table = load_prices(out)
    assert table.price("serverless", "compute").usd == pytest.approx(0.00003)
    assert table.price("lambda", "compute").usd == pytest.approx(0.000016)
    assert table.price("lambda", "requests").usd == pytest.approx(0.21)
    assert table.price("endpoint", "volume").usd == 0.15
    assert [body["ServiceCode"] for _, body in api if body["ServiceCode"] == "AWSLambda"]


def test_a_type_that_aws_does_not_know_is_an_error_and_what_was_read_is_kept(api, tmp_path, capsys):
    status, out = refresh(tmp_path, "--type", "ml.new.large", "--type", "ml.misspelt.large")
    assert status == 1
    assert load_prices(out).hourly("ml.new.large").usd == 0.3
    assert "no on-demand price of ml.misspelt.large" in capsys.readouterr().err


def test_prices_that_contradict_each_other_are_refused(api, tmp_path, capsys):
    status, out = refresh(tmp_path, "--type", "ml.two.large")
    assert (status, out.exists()) == (1, False)
    assert "0.3 (AWS Pricing API: SKU ONE" in capsys.readouterr().err


def test_a_dry_run_prints_the_requests_and_sends_none(api, tmp_path, capsys):
    status, out = refresh(tmp_path, "--type", "ml.g5.xlarge", "--dry-run", "--json")
    assert (status, out.exists(), api) == (0, False, [])
    (request,) = json.loads(capsys.readouterr().out)["requests"]
    assert request["operation"] == "GetProducts"
    assert request["parameters"] == request_for("ml.g5.xlarge", "us-east-1").parameters


def test_a_refreshed_type_of_instance_is_described_by_what_aws_says(api, tmp_path):
    _, out = refresh(tmp_path, "--type", "ml.g5.xlarge")
    known = load_prices(out).instance_type("ml.g5.xlarge")
    assert (known.vcpus, known.memory_gib, known.gpus, known.gpu) == (4, 16.0, 1, "A10G")
