"""A full disk, by the command itself on a small file system: what is kept, and what is said."""

import re
import subprocess

import pytest

from tests.permissions import small_disk
from tests.training.two_hosts import ENDLESS, TINY, forked, job_tree, log_of, run, train_with_charts

pytestmark = pytest.mark.slow

FIGURES = r"it takes ([\d,]+) bytes, ([\d,]+) are free"
SMALL = TINY | {"stage": "dvae", "checkpoint_minutes": 1e-6}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """The bytes of a checkpoint and of a report of the small job."""
    tree = job_tree(tmp_path_factory.mktemp("sizes") / "ml", **SMALL, max_steps=1)
    run([tree], work=train_with_charts)
    (checkpoint,) = tree.root.glob("checkpoints/dvae/step-*.pt")
    return checkpoint.stat().st_size, (tree.root / "output/data/report.html").stat().st_size


def failure_of(tree):
    with forked([tree], work=train_with_charts) as (process,):
        assert process.wait(timeout=300) == 1, log_of(tree)
    return tree.failure


def says_what_it_takes(failure):
    figures = re.search(FIGURES, failure)
    assert figures, failure
    takes, free = (int(number.replace(",", "")) for number in figures.groups())
    assert takes > free


def test_a_checkpoint_without_room_leaves_the_one_before_from_which_a_larger_disk_goes_on(
    tmp_path, sizes
):
    tree = job_tree(tmp_path / "ml", **SMALL, max_steps=5)
    directory = tree.root / "checkpoints"
    checkpoint, _ = sizes
    with small_disk(directory, round(2.5 * checkpoint)):
        failure = failure_of(tree)
        path = directory / "dvae" / "step-000000003.pt"
        says = f"no room to write the checkpoint {path} (No space left on device): it takes "
        assert failure.startswith(says)
        assert "the one before it is kept. Give the job a larger volume or keep fewer" in failure
        says_what_it_takes(failure)
        kept = sorted(path.name for path in path.parent.iterdir())
        assert kept == ["step-000000001.pt", "step-000000002.pt"]

        larger = f"remount,size={4 * checkpoint}"
        subprocess.run(["mount", "-o", larger, str(directory)], check=True)
        run([tree])
    assert "dvae continues at step 2" in log_of(tree)


def test_a_model_without_room_is_not_half_there(tmp_path):
    tree = job_tree(tmp_path / "ml", **SMALL, max_steps=1)
    with small_disk(tree.root / "model", 24_000):  # the weights alone are 38 kB
        failure = failure_of(tree)
        assert failure.startswith(f"no room to write the artefact {tree.root / 'model'} (No space")
        assert "give the job a larger volume" in failure
        says_what_it_takes(failure)
        assert list((tree.root / "model").iterdir()) == []
    assert list(tree.root.glob("checkpoints/dvae/step-000000001.pt"))


def test_metrics_without_room_fail_the_job_and_the_failure_file_still_has_its_room(tmp_path):
    tree = job_tree(tmp_path / "ml", **ENDLESS)
    with small_disk(tree.root / "output", 100_000):
        failure = failure_of(tree)
        assert failure.startswith(f"no room to write the metrics {tree.root / 'output'}/")
        assert "Give the job a larger volume, or report less often (log_every)" in failure
        assert "bytes are free" in failure


def test_a_report_without_room_does_not_cost_the_model(tmp_path, sizes):
    tree = job_tree(tmp_path / "ml", **SMALL, max_steps=1)
    _, report = sizes
    with small_disk(tree.root / "output", report // 2):
        failure = failure_of(tree)
        assert failure.startswith(f"no room to write the report {tree.root / 'output/data'}/report")
        says_what_it_takes(failure)
        assert not list((tree.root / "output/data").glob("report.html*"))
    assert (tree.root / "model/manifest.json").exists()
