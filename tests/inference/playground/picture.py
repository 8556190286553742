"""Take the README's picture of the page, with a model that was trained.

python -m tests.inference.playground.picture --root out/demo/ml --out inference/playground.png
"""

import argparse
from pathlib import Path
from typing import Any

from tests.inference.playground.conftest import chromium
from tests.inference.served import running

CAPTIONS = (
    "smaller filled red square",
    "big filled violet crescent",
    "big filled orange star",
    "bigger filled rainbow star",
)
NUM_CANDIDATES = 15  # with the best one large, three full rows
MOST_BYTES = 500_000


def take(page: Any, path: Path, captions: tuple[str, ...] = CAPTIONS) -> None:
    """Generate a run for each caption, and write what the window shows at the end."""
    page.fill("#num_candidates", str(NUM_CANDIDATES))
    for seed, caption in enumerate(captions, start=1):
        page.fill("#caption", caption)
        page.fill("#seed", str(seed))
        page.click("#generate")
        page.wait_for_selector(f"#runs li:nth-child({seed})")
    page.focus("body")
    page.screenshot(path=path, full_page=True, animations="disabled")
    size = path.stat().st_size
    assert size < MOST_BYTES, f"{path} has {size:,} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory that holds `model`")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args()
    with running(options.root.absolute(), DALLE_PLAYGROUND="1") as served, chromium() as browser:
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        page = context.new_page()
        page.goto(served.ready().url)
        page.wait_for_selector("#generate:enabled")
        take(page, options.out)
        context.close()


if __name__ == "__main__":
    main()
