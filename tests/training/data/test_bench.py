"""training.data.tools.bench: the loader's speed, with a last line for machines."""

import json

from training.data.__main__ import main
from training.data.tools import bench


def test_the_last_line_has_a_speed_for_every_size(capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", ((64, 48), (96, 64)))
    assert main(["bench", "--image-size", "32", "--seconds", "0.05"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["image_size"] == 32
    assert [(row["width"], row["height"]) for row in found["sizes"]] == [(64, 48), (96, 64)]
    assert all(row["images_per_cpu_second"] > 0 for row in found["sizes"])
    assert all(0 < row["image_megabytes"] < 0.1 for row in found["sizes"])
    assert lines[1].startswith("64 x 48")
    assert found["layouts"].pop("tar shards") == 1
    assert set(found["layouts"]) == {"text files", "Parquet", "metadata table"}
    assert all(share > 0 for share in found["layouts"].values())
