#!/usr/bin/env python3
"""`pip` in the image: refuses to install anything, in words, where the SageMaker SDK looks for it.

The SDK's script for `ModelTrainer(source_code=SourceCode(...))` wants a `pip` on PATH and installs
the user's requirements by `python -m pip`. The image's packages are locked, and none can be added.
Copied into the image as the module pip and as the commands pip and pip3. Standard library only.
"""

from __future__ import annotations

import sys

REFUSAL = (
    "this image installs no packages (`pip {words}`): its own are locked, and `train` and `serve` "
    "need no others. Leave `requirements` out of SourceCode; for code of your own make an image "
    "FROM this one that has its packages"
)


def main() -> int:
    """Say why nothing is installed, in the log and as the job's reason; return exit code 1."""
    from dalle.platform.environment import Paths
    from dalle.platform.outputs import write_failure

    refusal = REFUSAL.format(words=" ".join(sys.argv[1:]))
    print(f"pip: {refusal}", file=sys.stderr, flush=True)
    if "install" in sys.argv[1:]:
        write_failure(Paths(), refusal)
    return 1


if __name__ == "__main__":
    sys.exit(main())
