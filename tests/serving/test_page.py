"""The page in a real browser: headless Chromium, through Playwright."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from dermaflux.images import read_marks
from serving.keys import line, made
from tests.serving.live import Live, picture, running, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# No sandbox: tests run as root in containers. The others keep the browser from calling home.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# A busy machine takes its time; a test that passes does not wait for it.
expect.set_options(timeout=20_000)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed; apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, live: Live) -> Iterator[Page]:
    """The page of `live`; nothing may be asked of others or be complained of."""
    with opened(browser, live) as page:
        yield page


class opened:
    """An open page that fails the test on complaints, and on requests to anybody else."""

    def __init__(
        self, browser: Browser, live: Live, *, ready: bool = True, **options: object
    ) -> None:
        self.ready = ready
        self.page = browser.new_page(**options)  # type: ignore[arg-type]
        self.complaints: list[str] = []
        self.live = live
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._listen)
        self.page.on("request", self._watch)

    def __enter__(self) -> Page:
        self.page.goto(self.live.url)
        if self.ready:
            self.page.wait_for_selector("html[data-ready]")
        return self.page

    def __exit__(self, *_: object) -> None:
        self.page.close()
        assert not self.complaints

    def _listen(self, message) -> None:  # type: ignore[no-untyped-def]
        # The browser logs every refused request; tests look at what the page makes of it.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _watch(self, request) -> None:  # type: ignore[no-untyped-def]
        if not request.url.startswith((self.live.url, f"blob:{self.live.url}")):
            self.complaints.append(f"asked {request.url}")


def drawn(page: Page) -> bytes:
    """The image that is shown, once it is there, as the page hands it out."""
    expect(page.locator("#drawing")).to_have_attribute("data-state", "done")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert re.fullmatch(r"dermaflux-\d+\.png", download.value.suggested_filename)
    return Path(download.value.path()).read_bytes()


def upload(page: Page, data: bytes, name: str = "photo.png", kind: str = "image/png") -> None:
    file = {"name": name, "mimeType": kind, "buffer": data}
    page.set_input_files("#photo", files=[file])  # type: ignore[list-item]


def test_notice_is_plain_to_see(page: Page) -> None:
    expect(page.get_by_text("Research use only; not a medical device.").first).to_be_in_viewport()
    expect(page.locator("#about-content")).to_contain_text("CC0-1.0")
    expect(page.locator("#about-content")).to_contain_text("a test")


def test_described_lesion_is_drawn_and_marked(page: Page) -> None:
    page.select_option("#diagnosis", "melanoma")
    expect(page.get_by_role("radio", name="malignant")).to_be_checked()
    page.get_by_role("checkbox", name="black").check()
    expect(page.get_by_role("checkbox", name="dark brown")).to_be_checked()
    page.get_by_role("radiogroup", name="Border").get_by_role(
        "radio", name="irregular", exact=True
    ).check()
    page.get_by_role("button", name="Generate").click()
    marks = read_marks(drawn(page))
    assert marks["dermaflux.prompt"] == (
        "dermoscopic image of a malignant lesion, melanoma, irregular border, "
        "light brown and dark brown and black, medium in the field"
    )
    expect(page.get_by_text("Synthetic image").first).to_be_visible()
    expect(page.locator("#drawn-facts")).to_contain_text(marks["dermaflux.seed"])
    expect(page.locator("#draw-status")).to_contain_text("The image is there")
    box = page.locator("#drawn").bounding_box()
    assert box is not None
    assert box["width"] > 400  # A 64 px image, drawn large.


def test_other_label_takes_the_diagnosis_back(page: Page) -> None:
    page.select_option("#diagnosis", "melanoma")
    page.get_by_role("radio", name="benign").check()
    expect(page.locator("#diagnosis")).to_have_value("")


def test_repeat_gives_the_same_image_and_new_seed_another(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    first = drawn(page)
    source = page.locator("#drawn").get_attribute("src") or ""
    page.get_by_role("button", name="Repeat this seed").click()
    expect(page.locator("#drawn")).not_to_have_attribute("src", source)
    assert drawn(page) == first
    expect(page.locator("#seed")).to_have_value(read_marks(first)["dermaflux.seed"])
    source = page.locator("#drawn").get_attribute("src") or ""
    page.get_by_role("button", name="New seed").click()
    expect(page.locator("#drawn")).not_to_have_attribute("src", source)
    assert drawn(page) != first


def test_keyboard_is_enough_for_free_text(browser: Browser) -> None:
    with (
        running(anonymous_roles=("generate", "classify", "free-text")) as live,
        opened(browser, live) as page,
    ):
        write_by_keyboard(page)


def test_free_text_is_offered_to_those_who_may_use_it(page: Page) -> None:
    expect(page.locator("#mode")).to_be_hidden()
    expect(page.locator("#attributes")).to_be_visible()


def write_by_keyboard(page: Page) -> None:
    page.locator("input[value=attributes]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("a benign lesion")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "draw-start":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert read_marks(drawn(page))["dermaflux.prompt"] == "a benign lesion"


def test_progress_is_shown_and_stop_stops(page: Page, live: Live) -> None:
    page.fill("#steps", "50")
    with live.brake.closed():
        page.get_by_role("button", name="Generate").click()
        stop = page.get_by_role("button", name="Stop")
        expect(stop).to_be_visible()
        live.brake.wait_for(1)
        stop.click()
        expect(page.locator("#draw-status")).to_have_text("Stopped.")
        expect(stop).to_be_hidden()
        until(lambda: live.count("dermaflux_generations_total", outcome="cancelled") == 1)
    assert live.brake.steps <= 2


def test_steps_are_told_on_the_way(page: Page, live: Live) -> None:
    page.evaluate(
        "window.told = []; new MutationObserver(() => told.push(document.querySelector("
        "'#progress-text').textContent)).observe(document.querySelector('#progress-text'), "
        "{ childList: true })"
    )
    page.get_by_role("button", name="Generate").click()
    drawn(page)
    assert page.evaluate("told").count("Step 4 of 4") == 1


def test_several_images_are_shown_one_large_and_all_small(page: Page) -> None:
    page.select_option("#count", "3")
    page.fill("#seed", "70")
    page.get_by_role("button", name="Generate").click()
    first = drawn(page)
    assert read_marks(first)["dermaflux.seed"] == "70"
    small = page.get_by_role("group", name="Images").get_by_role("button")
    expect(small).to_have_count(3)
    expect(page.locator("#strip img")).to_have_count(3)
    expect(page.locator("#draw-status")).to_have_text("3 images are there. Seeds 70, 71, 72.")
    third = page.get_by_role("button", name="Image 3 of 3")
    third.click()
    expect(third).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#drawn-facts")).to_contain_text("72")
    assert read_marks(drawn(page))["dermaflux.seed"] == "72"
    # Repeating is of the one that is shown.
    page.get_by_role("button", name="Repeat this seed").click()
    expect(page.locator("#strip")).to_be_hidden()
    expect(page.locator("#draw-status")).to_have_text("The image is there. Seed 72.")


def test_unfinished_images_are_shown_on_the_way_and_go(page: Page, live: Live) -> None:
    page.fill("#steps", "40")
    page.select_option("#count", "2")
    with live.brake.step_by_step() as let_one_step_pass:
        page.get_by_role("button", name="Generate").click()
        live.brake.wait_for(1)
        expect(page.locator("#unfinished")).to_be_hidden()
        # A step at a time, slowly: a stream whose reader falls behind leaves previews out.
        while not page.locator("#unfinished").is_visible():
            let_one_step_pass()
            page.wait_for_timeout(100)
        expect(page.get_by_text("Synthetic image, unfinished")).to_be_visible()
    drawn(page)
    expect(page.locator("#unfinished")).to_be_hidden()
    expect(page.get_by_text("Synthetic image, unfinished")).to_be_hidden()


def test_place_in_the_queue_is_told(browser: Browser) -> None:
    ask = {"lesion": {"label": "benign"}}
    with (
        running(batch=1) as live,
        ThreadPoolExecutor(2) as pool,
        live.brake.closed(),
        opened(browser, live) as page,
    ):
        before = [pool.submit(live.client.post, "/v1/generate", json=ask)]
        live.brake.wait_for(1)
        before.append(pool.submit(live.client.post, "/v1/generate", json=ask))
        until(lambda: live.count("dermaflux_images_waiting") == 1)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#progress-text")).to_have_text("Waiting: 2 before this one")
        live.brake.open.set()
        drawn(page)
        assert [reply.result().status_code for reply in before] == [200, 200]


def test_service_with_keys_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    key, entry = made("page", ["generate", "classify", "free-text"])
    keys = tmp_path / "keys.jsonl"
    keys.write_text(line(entry))
    keys.chmod(0o600)
    with running(keys=keys) as live, opened(browser, live, ready=False) as page:
        dialog = page.get_by_role("dialog", name="This service asks for a key")
        expect(dialog).to_be_visible()
        page.get_by_label("Key", exact=True).fill("dermaflux_wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The key is not known")
        page.get_by_label("Key", exact=True).fill(key)
        page.get_by_role("button", name="Use it").click()
        page.wait_for_selector("html[data-ready]")
        expect(dialog).to_be_hidden()
        expect(page.locator("#mode")).to_be_visible()
        page.get_by_role("button", name="Generate").click()
        drawn(page)
        upload(page, picture(255))
        expect(page.locator("#decision")).to_have_text("Malignant")
        assert key not in page.content()
        assert page.evaluate("localStorage.length") == 0
        page.reload()
        page.wait_for_selector("html[data-ready]")
        page.get_by_role("button", name="Forget the key").click()
        expect(dialog).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        page.get_by_role("button", name="Not now").click()
        expect(page.locator("#load-error")).to_contain_text("Send a key")


def test_wrong_field_is_named_marked_and_focused(page: Page) -> None:
    page.fill("#steps", "99")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("steps: 99")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#steps")).to_be_focused()


def test_busy_service_is_told_in_words(browser: Browser) -> None:
    with (
        running(waiting=0) as live,
        ThreadPoolExecutor(1) as pool,
        live.brake.closed(),
        opened(browser, live) as page,
    ):
        pool.submit(live.client.post, "/v1/generate", json={"lesion": {"label": "benign"}})
        live.brake.wait_for(1)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#draw-error")).to_contain_text("come back in about")
        live.brake.open.set()


def test_photograph_is_judged_in_words_and_on_a_scale(page: Page) -> None:
    upload(page, picture(255))
    expect(page.locator("#decision")).to_have_text("Malignant")
    expect(page.locator("#because")).to_contain_text("at or above the threshold of 0.4")
    scale = page.get_by_role("img", name="Scale from 0")
    expect(scale).to_have_accessible_name(
        "Scale from 0, benign, to 1, malignant. Probability above 0.999. Threshold 0.4. "
        "No decision from 0.3 to 0.5."
    )
    track = page.locator(".track").bounding_box()
    tick = page.locator("#tick").bounding_box()
    band = page.locator("#band").bounding_box()
    assert track is not None
    assert tick is not None
    assert band is not None
    assert (tick["x"] + 1 - track["x"]) / track["width"] == pytest.approx(0.4, abs=0.01)
    assert band["width"] / track["width"] == pytest.approx(0.2, abs=0.01)
    upload(page, picture(0))
    expect(page.locator("#decision")).to_have_text("Benign")
    upload(page, picture(124))
    expect(page.locator("#decision")).to_have_text("No decision")
    expect(page.locator("#classify-status")).to_contain_text("Decision: No decision")


def test_map_of_where_the_model_looks_is_laid_over_the_picture(page: Page) -> None:
    upload(page, picture(255, size=(200, 100)))
    expect(page.locator("#decision")).to_have_text("Malignant")
    expect(page.locator("#saliency-map")).to_be_hidden()
    page.get_by_label("Show where the model looks").check()
    map_ = page.get_by_role("img", name="Where the model looked")
    expect(map_).to_be_visible()
    preview, layer = page.locator("#preview").bounding_box(), map_.bounding_box()
    assert preview is not None
    assert layer is not None
    assert layer == pytest.approx(preview, abs=1)
    # Of an oblong picture the middle square was looked at; the fake looks most at the lower right.
    alpha = page.evaluate(
        """() => {
            const canvas = document.querySelector("#saliency-map");
            const at = (x, y) => canvas.getContext("2d").getImageData(x, y, 1, 1).data[3];
            return [canvas.width, canvas.height, at(20, 50), at(60, 5), at(140, 95)];
        }"""
    )
    assert alpha[:4] == [200, 100, 0, 0]
    assert alpha[4] > 150
    page.get_by_label("Show where the model looks").uncheck()
    expect(map_).to_be_hidden()
    expect(page.locator("#decision")).to_have_text("Malignant")


def test_file_that_is_no_photograph_is_told_in_words(page: Page) -> None:
    upload(page, b"not an image")
    expect(page.locator("#classify-error")).to_contain_text("not a JPEG, PNG or WebP")
    expect(page.locator("#answer-full")).to_be_hidden()
    upload(page, b"%PDF", "a.pdf", "application/pdf")
    expect(page.locator("#classify-error")).to_contain_text("Send the image file")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_photograph_can_be_dropped_and_pasted(page: Page, way: str) -> None:
    numbers = json.dumps(list(picture(255)))
    page.evaluate(
        """([way, numbers]) => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(numbers)], "a.png", { type: "image/png" }));
            const event = way === "drop"
                ? new DragEvent("drop", { dataTransfer: held, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: held, bubbles: true });
            document.querySelector("#drop").dispatchEvent(event);
        }""",
        [way, json.loads(numbers)],
    )
    expect(page.locator("#decision")).to_have_text("Malignant")
    expect(page.locator("#preview")).to_be_visible()


def test_drawn_image_can_be_classified_and_stays_marked(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    drawn(page)
    page.get_by_role("button", name="Classify it").click()
    expect(page.locator("#decision")).not_to_be_empty()
    expect(page.locator("#preview-synthetic")).to_be_visible()
    upload(page, picture(0))
    expect(page.locator("#preview-synthetic")).to_be_hidden()


def test_bundle_without_classifier_has_no_second_panel(browser: Browser) -> None:
    with running(classifies=False) as live, opened(browser, live) as page:
        expect(page.locator("#classify")).to_be_hidden()
        expect(page.get_by_role("link", name="Classify")).to_be_hidden()
        page.get_by_role("button", name="Generate").click()
        drawn(page)
        expect(page.get_by_role("button", name="Classify it")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_need_no_sideways_scrolling(
    browser: Browser, live: Live, scheme: str
) -> None:
    size = {"width": 360, "height": 700}
    with opened(browser, live, viewport=size, color_scheme=scheme) as page:
        page.get_by_role("button", name="Generate").click()
        drawn(page)
        upload(page, picture(255))
        expect(page.locator("#decision")).to_have_text("Malignant")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shade = sum(int(part) for part in ground[4:-1].split(",")) / 3
        assert (shade > 128) == (scheme == "light")
