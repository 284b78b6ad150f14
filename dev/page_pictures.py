"""The pictures of the page in docs/serve: python dev/page_pictures.py. Needs Debian's chromium and playwright."""

import io
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
PORT = 8765
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PROMPTS = ["a penguin on a yellow background", "a rocket on green", "a strawberry", "a ship, 3D style, on a white background"]


def main() -> None:
    """Serve the bundled model, draw a few pictures on the page, and photograph it while one grows."""
    server = subprocess.Popen([sys.executable, "-m", "bitdance", "serve", "--port", str(PORT)], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{PORT}"
    try:
        wait(url + "/health")
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            page.goto(url)
            for prompt in PROMPTS:
                draw(page, prompt, 1)
            page.evaluate("document.getElementById('stage').replaceChildren()")
            page.select_option("#beside", "fast")
            page.fill("#prompt", "a fox on a blue background")
            page.click("#make")
            page.wait_for_selector("#stage .job:nth-child(1) figure[data-previews='2']")
            save(page, "page.png")
            page.wait_for_selector("#cancel:disabled")
            page.emulate_media(color_scheme="dark")
            page.set_viewport_size({"width": 412, "height": 860})
            page.locator("#gallery-part").scroll_into_view_if_needed()
            save(page, "page-phone.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def wait(url: str) -> None:
    """Until the server answers."""
    for _ in range(600):
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


def draw(page: Page, prompt: str, seed: int) -> None:
    """One picture, waited for."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.locator("#lock").uncheck()
    page.click("#make")
    page.wait_for_selector(f"#gallery li:nth-child({PROMPTS.index(prompt) + 1})")


def save(page: Page, name: str) -> None:
    """What the page shows, in 256 colours."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, Image.Quantize.MEDIANCUT).save(ROOT / "docs/serve" / name, optimize=True)


if __name__ == "__main__":
    main()
