"""Photographs a part of a run's page in Debian's chromium, for the README. After `make test-browser`:

    python docs/photograph.py RUN/report.html docs/page-grpo.png --top '#read' --height 980 \\
        --at 'color=log-prob&only=divided&open=tiny-train-965&at=3&n=3'
    python docs/photograph.py compare.html docs/page-compare.png --height 1500 --at 'only=divided&side=1'

The runs in the pictures are small ones of the built-in model: train_grpo.py --algorithm dapo --steps 3
--batch 4 --samples 6 from an SFT; and evaluations of the demo, put on one page by
python -m slm.report compare.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def photograph(page: Path, out: Path, at: str, top: str, height: int) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"),
                                             args=["--headless", "--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1240, "height": height})
        tab.goto(f"file://{page.resolve()}#{at}")
        tab.wait_for_selector("body[data-ready]")
        tab.wait_for_selector("#read[hidden], #detail > *", state="attached")
        tab.evaluate("top => document.querySelector(top).scrollIntoView()", top)
        tab.screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("page", type=Path, metavar="PAGE.html")
    p.add_argument("out", type=Path, metavar="OUT.png")
    p.add_argument("--at", default="", help="what stands behind # in the page's address")
    p.add_argument("--top", default="header", help="what the picture begins with, as a CSS selector")
    p.add_argument("--height", type=int, default=760, help="in pixels (default 760)")
    photograph(**vars(p.parse_args()))
