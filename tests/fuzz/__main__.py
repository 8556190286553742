"""Hostile requests at `serve`, and hostile files at what reads them.

python -m tests.fuzz --requests 100000 --cases 10000 --files 2000        make fuzz

The same seed makes the same requests and files. The last line is JSON.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from dalle import artefact as artefacts
from tests.conftest import build_tiny_models
from tests.fuzz import files, requests, schema
from tests.inference.served import running

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--cases", type=int, default=10_000, help="made from /openapi.json")
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        artefacts.save(model, build_tiny_models())
        of_files = files.fuzz(model, arguments.files, arguments.seed)
        print(json.dumps(dict(sorted(of_files.items()))), flush=True)
        root = Path(directory, "root")
        shutil.copytree(model, root / "model")
        with running(root, DALLE_MAX_CANDIDATES="4", DALLE_BODY_SECONDS="5") as served:
            of_schema = schema.fuzz(served.ready(), arguments.cases, arguments.seed)
            print(json.dumps(dict(sorted(of_schema.items()))), flush=True)
            of_requests = requests.fuzz(served, arguments.requests, arguments.seed)
        counts = dict(sorted(of_requests.counts.items()))
        result = {"files": of_files, "requests": counts, "slowest_seconds": of_requests.slowest}
        print(json.dumps(result))
