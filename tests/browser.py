"""What Chromium (a Debian package) makes of a page, without a window."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium (a Debian package) is not installed")


def run_chromium(page: Path, folder: Path, *flags: str, width: int = 1100) -> subprocess.CompletedProcess[str]:
    """Opens a page, with a profile of its own in the folder."""
    own = [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1400", *flags]
    return subprocess.run(["chromium", *own, f"file://{page}"], capture_output=True, text=True, timeout=120, check=True)


def ask_page(page: Path, folder: Path, script: str, *, width: int = 1100) -> Any:
    """Runs a script at the end of a page that leaves its answer in `seen`. Nothing may be written to the console."""
    answer = (
        f'<script>{script}\nconst found = document.createElement("pre"); found.id = "found"; '
        "found.textContent = JSON.stringify(seen); document.body.append(found);</script></body>"
    )
    copy = folder / f"asked_{width}.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", answer), encoding="utf-8")
    done = run_chromium(copy, folder, "--enable-logging=stderr", "--dump-dom", width=width)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, "the script did not come to its end"
    return json.loads(html.unescape(found[1]))


def brightness(page: Path, folder: Path, *, dark: bool) -> float:
    """Mean grey of the first screen, 0 to 255, for a reader who prefers dark or light pages."""
    picture = folder / f"{'dark' if dark else 'light'}.png"
    run_chromium(page, folder, f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={picture}")
    with Image.open(picture) as shot:
        return float(np.asarray(shot.convert("L")).mean())
