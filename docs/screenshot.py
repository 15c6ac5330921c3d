"""Take the pictures of a report that the README shows, with a headless Chromium.

    python docs/screenshot.py runs/quickstart/report.html

It writes docs/report.png and, in the dark theme, docs/report-dark.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from small_png import make_small

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)


def browser() -> str:
    """The path of a Chromium, of whatever name."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    sys.exit(f"no browser found; looked for {', '.join(BROWSERS)}")


def take_picture(
    report: Path, picture: Path, *, theme: str, size: tuple[int, int], scale: float
) -> None:
    """Write a PNG of the top of a report, `size` in CSS pixels and `scale` pixels to each."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser(),
                *QUIET,
                f"--user-data-dir={profile}",
                f"--window-size={size[0]},{size[1]}",
                f"--force-device-scale-factor={scale:g}",
                f"--screenshot={picture.resolve()}",
                f"{report.resolve().as_uri()}?theme={theme}",
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


def main() -> None:
    """Take one picture in each theme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="the report.html of a run")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="the folder")
    parser.add_argument("--width", type=int, default=1280, help="CSS pixels")
    parser.add_argument("--height", type=int, default=940, help="CSS pixels")
    parser.add_argument("--scale", type=float, default=1.5, help="pixels to a CSS pixel")
    arguments = parser.parse_args()
    if not arguments.report.is_file():
        parser.error(f"there is no {arguments.report}; `dominie run` writes it")
    for theme, name in (("light", "report.png"), ("dark", "report-dark.png")):
        picture = arguments.to / name
        size = (arguments.width, arguments.height)
        take_picture(arguments.report, picture, theme=theme, size=size, scale=arguments.scale)
        make_small(picture)
        print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
