"""Take docs/report.png: the page of a pruning, light and dark, in Debian's chromium.

python docs/screenshot.py REPORT.html     # such as demo/report.html
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.browser import browser, opened  # from the root of the repository

SIZE = {"width": 1100, "height": 1010}


def main(file: Path) -> None:
    """Show the top of the page, its left half light and its right half dark."""
    halves = {}
    with browser() as running:
        for scheme in ("light", "dark"):
            with opened(running, file.resolve(), viewport=SIZE, color_scheme=scheme) as (page, complaints):
                halves[scheme] = Image.open(io.BytesIO(page.screenshot()))
                if complaints:
                    raise SystemExit("\n".join(complaints))
    middle = SIZE["width"] // 2
    halves["light"].paste(halves["dark"].crop((middle, 0, *halves["dark"].size)), (middle, 0))
    target = Path(__file__).with_name("report.png")
    halves["light"].convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
