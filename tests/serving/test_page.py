"""Does the page chat, in a browser: words, pictures, sounds, a microphone, errors?"""

import os
import shutil
from pathlib import Path

import pytest

for library in ("playwright", "fastapi", "uvicorn", "PIL", "tokenizers"):
    pytest.importorskip(library)

from playwright.sync_api import expect, sync_playwright  # noqa: E402 (may be absent)

from mmkernels.models.multimodal import MultimodalModel  # noqa: E402
from mmkernels.models.trained import SAMPLES, TINY  # noqa: E402
from mmkernels.serving.server import Settings  # noqa: E402
from tests.serving import small  # noqa: E402
from tests.serving.running import serve  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    # A microphone that beeps, and leave to use it.
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip
SCREENSHOT = "MMKERNELS_SCREENSHOT"
PATIENCE = 30_000  # ms


@pytest.fixture(scope="module")
def running():
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=CHROMIUM,
            args=list(QUIET),
            viewport={"width": 900, "height": 900},
        )
        context.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        yield context
        context.close()


@pytest.fixture
def open_page(browser):
    """Opens a page of a server; in the end, nothing came from elsewhere and nothing broke."""
    opened, asked, broken = [], [], []

    def open_one(server):
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(server.url)
        opened.append((page, server))
        return page

    yield open_one
    allowed = (*(server.url for _, server in opened), "data:", "blob:")
    for page, _ in opened:
        page.close()
    assert [url for url in asked if not url.startswith(allowed)] == []
    assert broken == []


@pytest.fixture
def page(open_page, running):
    return open_page(running)


def say(page, text):
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def answer(page):
    """The last answer, once it is whole."""
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".turn.waiting")).to_have_count(0)
    return page.locator(".turn.assistant").last


def test_text(page):
    expect(page.locator("#status")).to_have_text("small")
    say(page, "hello")
    expect(page.locator(".turn.assistant")).to_have_text(small.text_of("hello"))
    say(page, "accents")
    expect(answer(page)).not_to_be_empty()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_text("Show it a digit")).to_be_visible()


def test_a_drawn_picture_is_seen(page):
    say(page, "draw")
    drawn = answer(page).get_by_alt_text("Drawn picture")
    assert drawn.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [32, 32]


def test_a_spoken_sound_can_be_played(page):
    say(page, "say")
    spoken = answer(page).get_by_label("Spoken answer")
    expect(spoken).to_have_js_property("error", None)
    page.wait_for_function("document.querySelector('audio').duration > 0.1")


def test_examples_send_pictures_and_sounds(page):
    page.get_by_role("button", name="Add the digit you see").click()
    question = page.locator(".turn.user")
    expect(question.get_by_alt_text("Attached picture")).to_be_visible()
    expect(question.get_by_label("Attached sound")).to_be_visible()
    expect(answer(page)).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_files_are_attached_and_sent(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(small.png(2000, 1000))
    page.locator("#image-file").set_input_files(large)
    page.locator("#sound-file").set_input_files(SAMPLES / "two.wav")
    expect(page.locator(".chip")).to_have_count(2)
    page.locator(".chip").first.get_by_label("Remove").click()
    expect(page.locator(".chip")).to_have_count(1)
    page.locator("#image-file").set_input_files(large)
    expect(page.locator(".chip")).to_have_count(2)
    say(page, "hello")
    picture = page.locator(".turn.user").get_by_alt_text("Attached picture")
    assert picture.evaluate("image => image.naturalWidth") == 768
    expect(answer(page)).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_recording_is_attached(page):
    page.get_by_role("button", name="Record your voice").click()
    expect(page.locator("#record")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Record your voice").click()
    expect(page.locator(".chip audio")).to_have_count(1)
    say(page, "hello")
    expect(answer(page)).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_what_is_wrong_is_said(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(small.png()[:60])
    page.locator("#image-file").set_input_files(broken)
    expect(page.get_by_role("alert")).to_have_text(
        "broken.png is no picture that this browser can show."
    )
    page.get_by_label("Your message").fill("x" * 25_000)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert").last).to_contain_text("more than 20000 characters")
    say(page, "hello")
    expect(answer(page)).to_have_text(small.text_of("hello"))


def test_a_key_is_asked_for(open_page):
    with serve(Settings(api_key="secret")) as server:
        page = open_page(server)
        say(page, "hello")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.get_by_label("API key").fill("secret")
        say(page, "hello")
        expect(page.locator(".turn.assistant")).to_have_text(small.text_of("hello"))


def test_a_phone_needs_no_scrolling_sideways(page):
    page.set_viewport_size({"width": 360, "height": 640})
    say(page, "x" * 200)
    expect(answer(page)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.skipif(not os.environ.get(SCREENSHOT), reason=f"{SCREENSHOT} is not set")
def test_screenshot(open_page):
    """Writes docs/images/chat.png: the trained model, asked the page's examples."""
    with serve(model=MultimodalModel.from_pretrained(TINY), name="tiny", context=1024) as server:
        page = open_page(server)
        examples = ("Add the digit you see", "Draw a green eight", "Say six")
        for number, example in enumerate(examples, 1):
            page.evaluate("document.querySelector('#welcome').hidden = false")
            page.get_by_role("button", name=example).click()
            expect(page.locator(".turn.user")).to_have_count(number)
            answer(page)
        page.evaluate("document.querySelector('#welcome').hidden = true")
        page.wait_for_timeout(500)
        root = Path(__file__).parent.parent.parent
        page.screenshot(path=root / "docs" / "images" / "chat.png")
