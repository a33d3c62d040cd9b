"""Takes the picture of a report's first screen: `python docs/render_report.py report docs/images/report.png`.

Needs Chromium on the PATH. The picture of the README is that of the bundled model's planted fault, as
`divergence demo --out demo` reports it in demo/rotary-bf16.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1200, 845

if __name__ == "__main__":
    folder, picture = map(Path, sys.argv[1:])
    with sync_playwright() as playwright:
        # Containers run as root, where Chromium's sandbox cannot.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto((folder / "report.html").absolute().as_uri())
        page.screenshot(path=picture)
        browser.close()
