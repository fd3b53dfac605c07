"""Photographs the report for the documentation, into docs/images; needs Chromium.

python docs/screenshots.py
"""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import gradscope
from gradscope.demo.char_gpt import CharGPT
from gradscope.demo.loops import train, train_without_zero_grad
from gradscope.demo.text import CharText

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests"))
from chromium import Chromium  # noqa: E402

SIZE = (1180, 1020)


def watched(loop: Callable[..., Iterator[float]]) -> gradscope.Scope:
    """Run one of the demo's loops under watch."""
    torch.manual_seed(0)
    text = CharText(seed=0)
    model = CharGPT(text.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradscope.watch(model, optimizer) as scope:
        for _ in loop(model, optimizer, text.get_batch, 100):
            pass
    return scope


def photograph(browser: Chromium, page: Path, section: str, image: Path, scheme: str) -> None:
    """Take a picture of a window that shows a section of the page."""
    browser.prefers(scheme)
    browser.window(*SIZE)
    browser.open(page)
    while browser.run("document.documentElement.dataset.drawn") != "yes":
        time.sleep(0.05)
    browser.run(f"document.querySelector('{section}').scrollIntoView({{behavior: 'instant'}})")
    time.sleep(1)  # until the table of contents has noticed
    image.write_bytes(base64.b64decode(browser.call("Page.captureScreenshot")["data"]))
    print(image)


def main() -> None:
    """Photograph the report of each of the demo's loops."""
    with tempfile.TemporaryDirectory() as folder:
        browser = Chromium(Path(folder) / "profile")
        for loop, section, name, scheme in (
            (train, "body", "report.png", "light"),
            (train_without_zero_grad, "#flow", "report-dark.png", "dark"),
        ):
            page = watched(loop).report(Path(folder) / f"{name}.html")
            photograph(browser, page, section, IMAGES / name, scheme)
        browser.close()


if __name__ == "__main__":
    main()
