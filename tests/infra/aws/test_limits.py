"""What the platform cannot do is refused by name, with the number."""

import re
from dataclasses import replace

import pytest

from dalle.errors import PlanError
from infra.aws import limits
from infra.aws.deployment import Deployment
from infra.aws.limits import check_deployment, check_payload

REALTIME = Deployment(
    name="dalle",
    mode="realtime",
    image_uri="image",
    model_data="s3://bucket/model.tar.gz",
    instance_type="ml.m5.large",
)
GPU = replace(REALTIME, instance_type="ml.g5.xlarge", ami=limits.DEFAULT_AMI)
ASYNC = replace(GPU, mode="async", min_instances=0)
SERVERLESS = replace(
    REALTIME, mode="serverless", instance_type=None, memory_mb=6144, max_concurrency=5
)
BATCH = replace(REALTIME, mode="batch")


@pytest.mark.parametrize("wanted", [REALTIME, GPU, ASYNC, SERVERLESS, BATCH])
def test_a_deployment_within_the_limits_passes(wanted):
    check_deployment(wanted)


REFUSED = [
    # serverless
    (
        SERVERLESS,
        {"memory_mb": 7168},
        "1024 to 6144 MB of memory (6 GB) in steps of 1024, got 7168",
    ),
    (SERVERLESS, {"memory_mb": 1500}, "in steps of 1024, got 1500"),
    (SERVERLESS, {"image_bytes": 10 * 2**30 + 1}, "at most 10,737,418,240 bytes (10 GiB)"),
    (SERVERLESS, {"compressed_bytes": 2**34}, "and this one has packed 17,179,869,184"),
    (SERVERLESS, {"max_concurrency": 201}, "--max-concurrency must be 1 to 200, got 201"),
    (SERVERLESS, {"provisioned_concurrency": 6}, "1 to --max-concurrency, which is 5, got 6"),
    (SERVERLESS, {"instance_type": "ml.g5.xlarge"}, "has no instances and no GPU"),
    (SERVERLESS, {"isolate": True}, "--isolate does not exist for a serverless endpoint"),
    (SERVERLESS, {"ami": "x"}, "--ami does not exist for a serverless endpoint"),
    (SERVERLESS, {"invocation_seconds": 61}, "1 to 60 s in mode serverless, got 61; --mode async"),
    # real-time
    (REALTIME, {"invocation_seconds": 90}, "an invocation has 1 to 60 s in mode realtime, got 90"),
    (REALTIME, {"min_instances": 0}, "a real-time endpoint keeps at least 1 instance"),
    (REALTIME, {"max_instances": 0}, "--max-instances must be at least 1"),
    (REALTIME, {"min_instances": 3, "max_instances": 2}, "which is 3, got 2"),
    (REALTIME, {"memory_mb": 2048}, "--memory-mb is for --mode serverless alone"),
    (REALTIME, {"startup_seconds": 30}, "--startup-seconds must be 60 to 3600, got 30"),
    (REALTIME, {"download_seconds": 4000}, "--download-seconds must be 60 to 3600, got 4000"),
    (REALTIME, {"volume_gb": 600}, "--volume-gb must be 1 to 512, got 600"),
    (REALTIME, {"instance_type": None}, "mode realtime needs --instance-type"),
    (REALTIME, {"instance_type": "g5"}, "an instance type such as ml.g5.xlarge was expected"),
    # hosts and their drivers
    (GPU, {"ami": None}, "default has driver 470 on most families, and CUDA 12.8 needs driver 525"),
    (GPU, {"ami": "gpu-9"}, "InferenceAmiVersion 'gpu-9' is unknown; there are"),
    (GPU, {"instance_type": "ml.g7.xlarge"}, "needs driver 570 or newer, and al2-ami-sagemaker"),
    (GPU, {"instance_type": "ml.p3.2xlarge"}, "ml.p3.2xlarge has Volta GPUs"),
    (GPU, {"instance_type": "ml.p2.xlarge"}, "Kepler"),
    (GPU, {"instance_type": "ml.inf2.xlarge"}, "is neither a host with NVIDIA GPUs nor"),
    (GPU, {"volume_gb": 100}, "ml.g5.xlarge has a built-in disk"),
    (REALTIME, {"ami": limits.DEFAULT_AMI}, "is for GPU hosts, and ml.m5.large has no GPU"),
    (REALTIME, {"instance_type": "ml.c7g.large"}, "ARM processor, and the image is for x86"),
    # asynchronous
    (ASYNC, {"invocation_seconds": 3601}, "1 to 3600 s in mode async, got 3601"),
    (ASYNC, {"concurrent_per_instance": 1001}, "--concurrent must be 1 to 1000, got 1001"),
    # batch
    (BATCH, {"model_data": "s3://bucket/model/"}, "cannot read uncompressed models"),
    (BATCH, {"instance_type": "ml.p4d.24xlarge"}, "batch transform has no ml.p4d.24xlarge"),
    (BATCH, {"instance_type": "ml.t2.medium"}, "batch transform has no ml.t2.medium"),
    # model and environment
    (REALTIME, {"model_data": "model.tar.gz"}, "by its s3:// address, got 'model.tar.gz'"),
    (REALTIME, {"environment": {"A": "x" * 1025}}, "variable A is longer than 1024 characters"),
    (REALTIME, {"environment": {f"A{n}": "" for n in range(101)}}, "at most 100 environment"),
    (REALTIME, {"environment": {f"A{n}": "x" * 1000 for n in range(40)}}, "at most 32,768 bytes"),
]


@pytest.mark.parametrize(("wanted", "changes", "says"), REFUSED)
def test_what_the_platform_cannot_do_is_refused_by_name(wanted, changes, says):
    with pytest.raises(PlanError, match=re.escape(says)):
        check_deployment(replace(wanted, **changes))


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(PlanError) as result:
        check_deployment(replace(SERVERLESS, memory_mb=1, max_concurrency=0))
    assert str(result.value).count("\n- ") == 2


@pytest.mark.parametrize(
    ("kind", "ami"),
    [
        ("ml.g4dn.xlarge", limits.DEFAULT_AMI),
        ("ml.p5.48xlarge", limits.DEFAULT_AMI),
        ("ml.g7e.2xlarge", limits.NEWEST_AMI),
        ("ml.p6-b200.48xlarge", limits.NEWEST_AMI),
        ("ml.c7i.large", None),
        ("ml.m5.large", None),
    ],
)
def test_the_default_host_software_has_a_driver_for_the_image(kind, ami):
    assert limits.default_ami(kind) == ami
    check_deployment(replace(REALTIME, instance_type=kind, ami=ami))


def test_every_known_host_software_runs_the_images_cuda():
    assert min(limits.AMI_DRIVERS.values()) >= limits.OLDEST_DRIVER


@pytest.mark.parametrize(
    ("mode", "most"), [("realtime", 25e6), ("serverless", 4e6), ("async", 1e9), ("batch", 1e8)]
)
def test_a_payload_has_a_largest_size(mode, most):
    check_payload(mode, int(most))
    with pytest.raises(PlanError, match=f"at most {int(most):,} bytes, got {int(most) + 1:,}"):
        check_payload(mode, int(most) + 1)


@pytest.mark.parametrize(
    "kind", ["ml.m7g.large", "ml.c6gn.xlarge", "ml.r6gd.large", "ml.m8g.large"]
)
def test_arm_hosts_are_known(kind):
    assert limits.is_arm(kind)


@pytest.mark.parametrize(
    "kind", ["ml.g4dn.xlarge", "ml.g5.xlarge", "ml.m5d.large", "ml.g6e.xlarge"]
)
def test_other_hosts_are_not_taken_for_arm(kind):
    assert not limits.is_arm(kind)
