"""Hosts of several types for one endpoint, in the order of what a picture costs."""

import json
from typing import Any

import pytest

from infra.benchmark.run_file import save_run
from infra.endpoint.fleet.pool import cheapest, types_of
from tests.infra.aws_account import BUCKET
from tests.infra.measured_runs import a_run, scenario

MODEL = f"s3://{BUCKET}/models/job/output/model.tar.gz"
ASYNC = ["deploy", "--mode", "async", "--model", MODEL]
RESERVED = "arn:aws:sagemaker:us-east-1:123456789012:training-plan/ours"
POOL = ["--instance-type", "ml.g6.xlarge", "--fallback-types", "ml.g5.xlarge,ml.g4dn.xlarge"]


@pytest.fixture
def variant(account, infra, monkeypatch):
    """A function: words of `deploy` -> the production variant in its dry run."""

    def plan(*words: object) -> Any:
        result = infra(*ASYNC, *words, "--dry-run", "--json")
        assert result.code == 0, result.err
        sent = {request["operation"]: request["parameters"] for request in result.json["requests"]}
        (found,) = sent["CreateEndpointConfig"]["ProductionVariants"]
        return found

    return plan


@pytest.fixture
def comparison(tmp_path):
    """A function: type -> dollars per 1,000 pictures (None: a problem) -> a file of `compare`."""

    def write(**usd: float | None):
        options = [
            {
                "stands_for": kind.replace("_", "."),
                "busy": {"usd_per_1000_images": price or 0.0},
                "problem": None if price else "its GPU was not measured",
            }
            for kind, price in usd.items()
        ]
        path = tmp_path / "compare.json"
        path.write_text(json.dumps({"options": options}))
        return path

    return write


def test_types_are_tried_in_the_order_in_which_they_are_named(variant):
    found = variant(*POOL, "--provision-seconds", 900)
    assert found["InstancePools"] == [
        {"InstanceType": "ml.g6.xlarge", "Priority": 1},
        {"InstanceType": "ml.g5.xlarge", "Priority": 2},
        {"InstanceType": "ml.g4dn.xlarge", "Priority": 3},
    ]
    assert "InstanceType" not in found
    assert found["VariantInstanceProvisionTimeoutInSeconds"] == 900
    assert types_of(found) == ["ml.g6.xlarge", "ml.g5.xlarge", "ml.g4dn.xlarge"]


def test_one_type_is_no_pool(variant):
    found = variant("--instance-type", "ml.g5.xlarge")
    assert found["InstanceType"] == "ml.g5.xlarge"
    assert "InstancePools" not in found


def test_the_cheapest_1000_pictures_come_first(variant, comparison):
    path = comparison(
        ml_g5_xlarge=0.04, ml_c5_large=0.09, ml_g4dn_xlarge=0.03, ml_g6_xlarge=None, lambda_=0.001
    )
    assert cheapest(path) == ("ml.g4dn.xlarge", "ml.g5.xlarge")
    found = variant("--cheapest-of", path)
    assert [pool["InstanceType"] for pool in found["InstancePools"]] == [
        "ml.g4dn.xlarge",
        "ml.g5.xlarge",
    ]


def test_the_file_is_what_compare_writes(infra, tmp_path):
    save_run(a_run(scenario(1, 4.0, 0.25)), tmp_path / "cpu.json")
    out = tmp_path / "compare.json"
    result = infra("compare", f"{tmp_path}/cpu.json=ml.c5.xlarge,ml.c5.large", "--out", out)
    assert result.code == 0, result.err
    assert cheapest(out) == ("ml.c5.large", "ml.c5.xlarge")


def test_an_endpoint_may_have_reserved_capacity_alone(variant):
    found = variant("--instance-type", "ml.p5.48xlarge", "--reservation", RESERVED)
    assert found["CapacityReservationConfig"] == {
        "CapacityReservationPreference": "capacity-reservations-only",
        "MlReservationArn": RESERVED,
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--fallback-types", "ml.g5.xlarge"], "--fallback-types needs --instance-type"),
        ([*POOL, "--reservation", RESERVED], "--reservation is capacity of one type"),
        (
            ["--instance-type", "ml.g5.xlarge", "--fallback-types", "ml.c5.large"],
            "ml.g5.xlarge and ml.c5.large need different host software or devices",
        ),
        (
            ["--instance-type", "ml.g5.xlarge", "--fallback-types", "ml.g5.xlarge"],
            "every type once was expected",
        ),
        (
            [
                *["--instance-type", "ml.m5.large", "--fallback-types"],
                "ml.m5.xlarge,ml.m5.2xlarge,ml.c5.large,ml.c5.xlarge,ml.c5.2xlarge",
            ],
            "an endpoint has at most 5 types of instances, got 6",
        ),
        (
            [
                *["--instance-type", "ml.c5.large", "--fallback-types", "ml.c5d.large"],
                *["--volume-kms-key", "1234abcd-12ab-34cd-56ef-1234567890ab"],
            ],
            "of ml.c5.large, ml.c5d.large some have a built-in disk, which takes no key of KMS",
        ),
        ([*POOL, "--provision-seconds", 100], "--provision-seconds must be 300 to 3600, got 100"),
        ([*POOL, "--cheapest-of", "compare.json"], "--cheapest-of chooses the types"),
        (["--cheapest-of", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_hosts_that_the_platform_does_not_give_are_refused_before_any_request(
    account, infra, words, says
):
    result = infra(*ASYNC, *words)
    assert result.code == 1
    assert says in result.err
    assert account.requests.total() == 0


def test_a_file_of_something_else_is_refused(infra, account, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    result = infra(*ASYNC, "--cheapest-of", tmp_path / "other.json")
    assert result.code == 1
    assert "is not what `compare --out` writes" in result.err
