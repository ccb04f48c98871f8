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

    def __init__(self, browser: Browser, live: Live, **options: object) -> None:
        self.page = browser.new_page(**options)  # type: ignore[arg-type]
        self.complaints: list[str] = []
        self.live = live
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._listen)
        self.page.on("request", self._watch)

    def __enter__(self) -> Page:
        self.page.goto(self.live.url)
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


def test_keyboard_is_enough_for_free_text(page: Page) -> None:
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


def test_progress_is_shown_and_cancel_stops(page: Page, live: Live) -> None:
    page.fill("#steps", "50")
    with live.brake.closed():
        page.get_by_role("button", name="Generate").click()
        cancel = page.get_by_role("button", name="Cancel")
        expect(cancel).to_be_visible()
        live.brake.wait_for(1)
        cancel.click()
        expect(page.locator("#draw-status")).to_have_text("Cancelled.")
        expect(cancel).to_be_hidden()
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
        pool.submit(live.client.post, "/v1/generate", json={"prompt": "benign"})
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
