"""The page at `/`, in a real browser: pictures that grow, what is kept, what is restored, and who can use it."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refine_model import class_model, saved
from serve_model import SIZE, Hold, class_folder, running, text_folder, until

from bitdance.picture import save_png
from bitdance.serve.model import ServedModel
from bitdance.serve.settings import Limits

playwright: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'bitdance[test]'")
expect = playwright.expect
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
LIMITS = Limits(preview_share=1e9)  # every preview that is asked for
PHONE = {"width": 412, "height": 915}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here: install Debian's package chromium"),
]
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> ServedModel:
    return ServedModel.load(str(text_folder(tmp_path_factory.mktemp("models") / "text")), ("cpu",))


@pytest.fixture(scope="module")
def editing(tmp_path_factory: Any) -> ServedModel:
    """A refinement model of classes, which can change pictures."""
    return ServedModel.load(str(saved(class_model(), tmp_path_factory.mktemp("models") / "refine")), ("cpu",))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server in a browser that has never been there. Whatever the page complains of fails the test, and so
    does a request to anybody else."""
    opened: list[Any] = []
    wrong: list[str] = []

    def go(url: str, also: str = "", quiet: bool = False, **context: Any) -> Any:
        opened.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **context}))
        page = opened[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and not quiet and wrong.append(message.text))
        ours = (url, "blob:" + url, "data:", *filter(None, [also]))
        page.on("request", lambda request: request.url.startswith(ours) or wrong.append(request.url))
        page.goto(url)
        return page

    yield go
    for context in opened:
        context.close()
    assert wrong == []


def ready(page: Any) -> Any:
    """Once the page knows the model."""
    expect(page.locator("#model")).to_contain_text(",")
    return page


def kept(page: Any, count: int) -> None:
    """Until so many pictures lie in the gallery."""
    expect(page.locator("#gallery li")).to_have_count(count)


def make(page: Any, prompt: str = "a", seed: int | None = 1, **fields: str) -> None:
    """Fill the form and press Make."""
    for name, value in {"prompt": prompt, **({} if seed is None else {"seed": str(seed)}), **fields}.items():
        page.fill(f"#{name}", value)
    page.click("#make")


def picture(page: Any, selector: str) -> np.ndarray:
    """The pixels that an <img> shows."""
    width, height, values = page.locator(selector).evaluate(
        """async (image) => {
            await image.decode();
            const [width, height] = [image.naturalWidth, image.naturalHeight];
            const context = new OffscreenCanvas(width, height).getContext("2d");
            context.drawImage(image, 0, 0);
            return [width, height, [...context.getImageData(0, 0, width, height).data]];
        }"""
    )
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def own_picture(model: ServedModel, prompt: str, seed: int, **settings: Any) -> np.ndarray:
    return np.asarray(model.pipe(prompt, seed=seed, **settings).images[0])


def test_a_picture_grows_and_is_the_command_s(model: ServedModel, visit: Callable[..., Any]) -> None:
    """Each of the four blocks but the last gives a preview; the finished picture is that of its seed."""
    with running(model, LIMITS) as server:
        page = ready(visit(server.url))
        make(page)
        kept(page, 1)
        expect(page.locator("#status")).to_have_text(re.compile(r"Done in \d+\.\d s\."))
        expect(page.locator("#stage figure")).to_have_attribute("data-previews", "4")  # three, and the picture itself
        assert np.array_equal(picture(page, "#stage img"), own_picture(model, "a", 1))
        caption = page.locator("#stage figcaption").inner_text()
        assert re.fullmatch(r"seed 1, \d+\.\d s", caption) and page.locator("#gallery img").get_attribute("alt") == caption


def test_the_gallery_is_kept_and_gives_settings_back(model: ServedModel, visit: Callable[..., Any]) -> None:
    with running(model, LIMITS) as server:
        page = ready(visit(server.url))
        make(page, "a house", 7, guidance="1.5", steps="3")
        kept(page, 1)
        page.reload()
        ready(page)
        kept(page, 1)
        page.click("#gallery button")
        expect(page.locator("#detail-settings")).to_contain_text("a house")
        page.click("#use")  # nothing was written, so nothing is asked
        for name, value in {"prompt": "a house", "seed": "7", "guidance": "1.5", "steps": "3", "size": SIZE}.items():
            expect(page.locator(f"#{name}")).to_have_value(value)
        expect(page.locator("#lock")).to_be_checked()
        page.click("#clear")
        page.click("#ask-yes")
        kept(page, 0)


def test_the_seed_is_drawn_anew_unless_it_is_kept(model: ServedModel, visit: Callable[..., Any]) -> None:
    with running(model, LIMITS) as server:
        page = ready(visit(server.url))
        seeds = []
        for count, lock in ((1, False), (2, False), (3, True)):
            page.locator("#lock").set_checked(lock)
            make(page, seed=None)
            kept(page, count)
            expect(page.locator("#seed")).not_to_have_value("")
            seeds.append(page.input_value("#seed"))
        assert seeds[0] != seeds[1] == seeds[2]


def test_a_large_seed_keeps_all_its_digits(model: ServedModel, visit: Callable[..., Any]) -> None:
    """More than a number of JavaScript holds."""
    seed = 2**62 + 1
    with running(model, LIMITS) as server:
        page = ready(visit(server.url))
        make(page, seed=seed)
        kept(page, 1)
        assert np.array_equal(picture(page, "#stage img"), own_picture(model, "a", seed))
        page.click("#gallery button")
        expect(page.locator("#detail-settings")).to_contain_text(str(seed))


def test_keys_the_queue_and_cancelling(model: ServedModel, visit: Callable[..., Any], monkeypatch: Any) -> None:
    """Ctrl+Enter asks, twice; the second waits and says so; Escape ends both, at the server too."""
    with running(model, Limits(batch_size=1)) as server:
        hold = Hold(monkeypatch, model.pipe)
        page = ready(visit(server.url))
        page.fill("#prompt", "a")
        page.keyboard.press("Control+Enter")
        hold.wait()
        page.keyboard.press("Control+Enter")
        expect(page.locator("#status")).to_contain_text(re.compile(r"waiting, 0 pictures go first, about \d+ s"))
        expect(page.locator("#status")).to_contain_text("% drawn")
        page.keyboard.press("Escape")
        until(lambda: server.queue.waiting == 0)
        hold.go()
        until(lambda: server.queue.running == 0)
        expect(page.locator("#status")).to_have_text("Cancelled.")
        expect(page.locator("#stage figure")).to_have_count(0)
        expect(page.locator("#cancel")).to_be_disabled()
        kept(page, 0)


def test_a_visitor_who_comes_back_finds_the_picture(model: ServedModel, visit: Callable[..., Any], monkeypatch: Any) -> None:
    with running(model) as server:
        hold = Hold(monkeypatch, model.pipe)
        page = ready(visit(server.url))
        make(page)
        hold.wait()
        page.reload()
        ready(page)
        hold.go()
        kept(page, 1)
        assert np.array_equal(picture(page, "#stage img"), own_picture(model, "a", 1))


def test_a_dropped_picture_gives_its_settings(model: ServedModel, visit: Callable[..., Any], tmp_path: Path) -> None:
    """Asked before it overwrites; settings that have no field are said, sent, and can be left out; a photograph is refused."""
    said = {"prompt": "a tree", "seed": 5, "width": 32, "height": 32, "steps": 2, "guidance": 2.0, "sampler": "heun"}
    said |= {"guidance_interval": [0.3, 1.0], "last_steps": 3}  # which this model has no default of
    as_said = {"sampler": "heun", "guidance_interval": (0.3, 1.0), "last_steps": 3}
    file, photograph = io.BytesIO(), tmp_path / "photograph.png"
    save_png(Image.new("RGB", (8, 8)), file, {**said, "model": "other", "model_fingerprint": "f00"})
    Image.new("RGB", (8, 8)).save(photograph)
    with running(model, LIMITS) as server:
        page = ready(visit(server.url))
        page.fill("#prompt", "mine")
        drop(page, file.getvalue())
        page.click("#ask .close")
        expect(page.locator("#prompt")).to_have_value("mine")
        drop(page, file.getvalue())
        page.click("#ask-yes")
        expect(page.locator("#prompt")).to_have_value("a tree")
        expect(page.locator("#status")).to_contain_text("of another model, other")
        expect(page.locator("#more")).to_have_text("sampler = heun, guidance_interval = [0.3,1], last_steps = 3")
        page.click("#make")
        kept(page, 1)
        assert np.array_equal(picture(page, "#stage img"), own_picture(model, "a tree", 5, **as_said))
        page.click("#forget-more")
        page.click("#make")
        kept(page, 2)
        assert np.array_equal(picture(page, "#stage .job:first-child img"), own_picture(model, "a tree", 5))
        page.set_input_files("#file", photograph)
        expect(page.locator("#status")).to_contain_text("holds no settings")


def drop(page: Any, content: bytes) -> None:
    """Drop a PNG on the page."""
    page.evaluate(
        """(text) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
        }""",
        base64.b64encode(content).decode("ascii"),
    )


def test_presets_side_by_side_and_the_slider(model: ServedModel, visit: Callable[..., Any]) -> None:
    """One seed for both; the slider shows as much of the one as it says."""
    with running(model, LIMITS) as server:
        page = ready(visit(server.url))
        page.select_option("#beside", "fast")
        make(page, seed=None)
        kept(page, 2)
        captions = page.locator(".beside figcaption").all_inner_texts()
        assert [text.split(",")[0] for text in captions] == ["model's own", "preset fast"]
        assert len({re.search(r"seed \d+", text)[0] for text in captions}) == 1  # type: ignore[index]
        seed = int(page.input_value("#seed"))
        assert np.array_equal(picture(page, ".beside .job:nth-child(2) img"), own_picture(model, "a", seed, preset="fast"))
        expect(page.locator("#compare")).to_be_disabled()
        for tick in page.locator("#gallery input").all():
            tick.check()
        page.click("#compare")
        expect(page.locator("#slider")).to_be_visible()
        assert not np.array_equal(picture(page, "#over"), picture(page, "#under"))
        page.locator("#split").focus()
        page.keyboard.press("Home")
        expect(page.locator("#over")).to_have_css("clip-path", re.compile(r"inset\(0px 0px 0px 0%\)|inset\(0px\)"))
        page.keyboard.press("End")
        expect(page.locator("#over")).to_have_css("clip-path", "inset(0px 0px 0px 100%)")
        page.keyboard.press("Escape")
        expect(page.locator("#slider")).to_be_hidden()


def test_two_servers_side_by_side(model: ServedModel, visit: Callable[..., Any]) -> None:
    with running(model, LIMITS) as server, running(model, LIMITS, cors=[server.url]) as other:
        page = ready(visit(server.url, also=other.url))
        page.select_option("#beside", "other")
        page.fill("#other", other.url)
        make(page)
        kept(page, 2)
        assert np.array_equal(picture(page, ".job:nth-child(1) img"), picture(page, ".job:nth-child(2) img"))


def test_a_brush_says_what_is_drawn_anew(editing: ServedModel, visit: Callable[..., Any], monkeypatch: Any) -> None:
    """The left half is painted: the server is given that mask, and the changed picture joins the gallery."""
    masks: list[np.ndarray] = []
    plan = editing.plan_edit

    def seen(wanted: Any, image: Any, shows: Any, mask: Any, limits: Any) -> Any:
        masks.append(np.asarray(mask) if mask is not None else np.zeros(0))
        return plan(wanted, image, shows, mask, limits)

    monkeypatch.setattr(editing, "plan_edit", seen)
    with running(editing, LIMITS) as server:
        page = ready(visit(server.url))
        page.select_option("#class", "1")
        page.fill("#seed", "3")
        page.click("#make")
        kept(page, 1)
        for paint in (True, False):
            page.locator("#gallery button").last.click()
            page.click("#edit")
            expect(page.locator("#editor")).to_be_visible()
            box = page.locator("#mask").bounding_box()
            assert box is not None
            if paint:
                page.fill("#brush", "50")
                page.mouse.move(box["x"] + box["width"] / 4, box["y"])
                page.mouse.down()
                page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"], steps=4)
                page.mouse.up()
            else:
                page.click("#paint-all")
                page.click("#wipe")
            page.select_option("#edit-class", "2")
            page.click("#change")
            kept(page, 2 if paint else 3)
    painted, nothing = masks
    width = painted.shape[1]
    assert (painted[2:-2, 2 : width // 2 - 2] == 255).all() and (painted[:, width // 2 + 2 :] == 0).all()
    assert nothing.size == 0


def test_classes_are_chosen_by_name(tmp_path: Path, visit: Callable[..., Any]) -> None:
    model = ServedModel.load(str(class_folder(tmp_path / "classes")), ("cpu",))
    with running(model, LIMITS) as server:
        page = ready(visit(server.url))
        expect(page.locator("#prompt")).to_be_hidden()
        page.select_option("#class", label="fox")
        page.click("#make")
        kept(page, 1)
        page.click("#gallery button")
        expect(page.locator("#detail-settings")).to_contain_text("fox")
        page.click("#detail .close")
        page.select_option("#class", label="tench")
        page.locator("#lock").uncheck()
        page.click("#gallery button")
        page.click("#use")
        expect(page.locator("#class")).to_have_value("2")


def test_a_class_that_the_model_lacks_is_no_other_class(tmp_path: Path, visit: Callable[..., Any]) -> None:
    file = io.BytesIO()
    save_png(Image.new("RGB", (8, 8)), file, {"class": 207, "class_name": "golden retriever", "seed": 1})
    model = ServedModel.load(str(class_folder(tmp_path / "classes")), ("cpu",))
    with running(model, LIMITS) as server:
        page = ready(visit(server.url, quiet=True))
        drop(page, file.getvalue())
        expect(page.locator("#seed")).to_have_value("1")
        page.click("#make")
        expect(page.locator("#status")).to_contain_text("give class_label")


def test_what_is_wrong_is_said(model: ServedModel, visit: Callable[..., Any]) -> None:
    """In the server's words; a server that has gone is said too; a key is asked for where one is needed."""
    with running(model, LIMITS, api_key="geheim") as server:
        page = visit(server.url, quiet=True)  # the browser logs every answer that is an error
        expect(page.locator("#status")).to_have_text("This server wants an API key.")
        page.fill("#key", "geheim")
        page.keyboard.press("Tab")
        ready(page)
        make(page, size="1000x1000")
        expect(page.locator("#status")).to_contain_text("nearest as size, width first")
        expect(page.locator("#stage figure")).to_have_count(0)
        page.focus("#guidance")
        page.keyboard.type("1e")  # no number, of which the browser tells the page nothing
        page.keyboard.press("Control+Enter")
        expect(page.locator("#guidance:invalid")).to_be_focused()
        expect(page.locator("#stage figure")).to_have_count(0)
        page.fill("#guidance", "")
        make(page, size=SIZE)
        kept(page, 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["text", "refine"])
def test_everybody_can_use_it(
    scheme: str, kind: str, model: ServedModel, editing: ServedModel, visit: Callable[..., Any], tmp_path: Path
) -> None:
    """axe-core finds nothing: the page, a gallery, every dialog, on a screen and on a phone, in light and dark."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    with running(editing if kind == "refine" else model, LIMITS) as server:
        page = ready(visit(server.url, color_scheme=scheme, bypass_csp=True))
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 200) is (scheme == "dark")
        if kind == "text":
            page.fill("#prompt", "a")
            page.select_option("#beside", "other")
            page.select_option("#beside", "fast")
        page.fill("#count", "2")
        page.click("#make")
        kept(page, 4 if kind == "text" else 2)
        clean(axe, page, "page")
        page.locator("#gallery button").first.click()
        expect(page.locator("#detail")).to_be_visible()
        clean(axe, page, "detail")
        if kind == "refine":
            page.click("#edit")
            expect(page.locator("#editor")).to_be_visible()
            clean(axe, page, "editor")
        page.keyboard.press("Escape")
        for tick in page.locator("#gallery input").all()[:2]:
            tick.check()
        page.click("#compare")
        expect(page.locator("#slider")).to_be_visible()
        clean(axe, page, "slider")
        page.keyboard.press("Escape")
        page.set_viewport_size(PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        clean(axe, page, "phone")


def clean(axe: Any, page: Any, where: str) -> None:
    """No violation of axe-core's rules."""
    found = axe.run(page).response["violations"]
    assert found == [], f"{where}: " + json.dumps([(one["id"], [node["html"] for node in one["nodes"]]) for one in found])
