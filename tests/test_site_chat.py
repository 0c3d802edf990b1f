"""Talking on the site, on a desktop's and a phone's width: nothing a person wrote or reads gets lost or hidden."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import Page, expect
from site_server import NEEDS_CHROMIUM, PATIENCE, Client, Site, get, serving, watched
from talker import TOO_LONG, Talker, talking

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def talker() -> Iterator[tuple[str, Talker]]:
    with talking() as (address, server):
        yield address, server


@pytest.fixture(scope="module")
def chat(talker, tmp_path_factory) -> Iterator[Site]:
    """A site whose models answer at once, as tests want them to."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "runs").mkdir()
    with serving(folder / "runs", folder / "data", "--backend", talker[0]) as site:
        yield site


def send(page: Page, words: str, turns: int | None = None) -> None:
    page.fill("#prompt", words)
    page.click("#send")
    page.wait_for_url("**/chat/*/")
    if turns:
        expect(page.locator(".turn")).to_have_count(turns, timeout=PATIENCE)


def start(page: Page, chat: Site, words: str = "Hello") -> None:
    page.goto(chat.url)
    send(page, words, 1)
    expect(page.locator(".answer.done").first).to_be_visible(timeout=PATIENCE)


def answered(page: Page) -> None:
    expect(page.locator(".answer[aria-busy]")).to_have_count(0, timeout=PATIENCE)


def is_clear(page: Page, selector: str) -> bool:
    """Whether an element's end is above the composer and below the header, as one moment shows it."""
    clear: bool = page.evaluate(
        """(selector) => {
            const {bottom} = [...document.querySelectorAll(selector)].at(-1).getBoundingClientRect();
            return bottom > 48 && bottom <= document.querySelector("#composer").getBoundingClientRect().top;
        }""",
        selector,
    )
    return clear


def test_a_follow_up_is_seen_and_followed_without_loading_the_page(any_page, chat, talker):
    page = any_page
    start(page, chat)
    for turn in range(2, 9):
        send(page, f"Question {turn} long", turn)
        answered(page)
    page.evaluate("window.same = true")
    talker[1].pace = 0.02
    send(page, "The last question, long", 9)
    assert is_clear(page, ".said")
    expect(page.locator(".turn:last-child .answer .text p")).not_to_have_count(1, timeout=PATIENCE)
    for _ in range(3):
        page.wait_for_timeout(200)
        assert is_clear(page, ".turn:last-child .answer .text p:last-child")
    # The reader scrolls up: the answer goes on below, and the page stays where it is.
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -600)
    expect(page.get_by_role("button", name="Jump to the latest")).to_be_visible()
    page.wait_for_timeout(150)
    before = page.evaluate("scroller.scrollTop")
    page.wait_for_timeout(500)
    assert page.evaluate("scroller.scrollTop") == before
    page.get_by_role("button", name="Jump to the latest").click()
    talker[1].pace = 0.0
    answered(page)
    assert is_clear(page, ".turn:last-child footer")
    assert page.evaluate("window.same")
    assert page.locator(".top").bounding_box()["y"] == 0


def test_an_edit_is_in_its_place_can_be_cancelled_and_loses_no_turn(any_page, chat):
    page = any_page
    start(page, chat, "first")
    for turn in range(2, 9):
        send(page, f"turn {turn}", turn)
        answered(page)
    page.get_by_role("button", name="Edit", exact=True).first.click()
    area = page.locator(".turn:first-child .edit textarea")
    expect(area).to_be_focused()
    area.fill("something else")
    area.press("Escape")
    expect(page.locator(".edit")).to_have_count(0)
    assert page.locator(".said .words").first.inner_text() == "first"
    page.get_by_role("button", name="Edit", exact=True).first.click()
    page.get_by_role("button", name="Cancel").click()
    send(page, "turn 9", 9)
    answered(page)
    page.get_by_role("button", name="Edit", exact=True).nth(1).click()
    page.locator(".edit textarea").fill("turn 2, written anew")
    page.locator(".edit").get_by_role("button", name="Send").click()
    expect(page.locator(".turn")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator(".versions").first).to_contain_text("Version 2 of 2")
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".turn")).to_have_count(9, timeout=PATIENCE)
    expect(page.locator(".versions").first).to_contain_text("Version 1 of 2")


def test_words_survive_a_reload_and_a_site_that_is_gone(page, chat):
    page.goto(chat.url)
    page.fill("#prompt", "half a thought")
    page.reload()
    assert page.input_value("#prompt") == "half a thought"
    page.route("**/chat/say", lambda route: route.abort())
    page.click("#send")
    expect(page.locator("#fault")).to_contain_text("What you wrote is still here")
    assert page.input_value("#prompt") == "half a thought"
    page.unroute("**/chat/say")
    send(page, "half a thought", 1)
    assert page.input_value("#prompt") == ""


def test_the_frame_stays_and_nothing_hides_beneath_the_composer(any_page, chat):
    page = any_page
    start(page, chat, "long")
    send(page, "code and long", 2)
    answered(page)
    height = page.viewport_size["height"]
    box = page.locator("#composer").bounding_box()
    assert box["height"] <= 0.16 * height
    assert not re.search("Shift|Esc", page.get_attribute("#prompt", "placeholder"))
    hidden = page.evaluate(
        """() => {
            const found = [];
            const stops = "a, button, input, select, textarea, summary, [tabindex='0']";
            for (const each of document.querySelectorAll(stops)) {
                if (!each.checkVisibility({visibilityProperty: true}) || each.closest(".skip")) continue;
                each.focus();
                each.scrollIntoView({block: "nearest"});
                const {left, top, width, height} = each.getBoundingClientRect();
                const there = document.elementFromPoint(left + width / 2, top + Math.min(height, innerHeight) / 2);
                if (!there || !(each.contains(there) || there.contains(each))) found.push(each.outerHTML.slice(0, 90));
            }
            return found;
        }"""
    )
    assert not hidden
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, .button, select, input:not([type=hidden]), summary")]
            .filter((each) => each.checkVisibility())
            .map((each) => [each.outerHTML.slice(0, 80), each.getBoundingClientRect()])
            .filter(([, {width, height}]) => width < 24 || height < 24).map(([html]) => html)"""
    )
    assert not small


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_placeholders_can_be_read(page, chat, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(chat.url)
    ink, paper = page.evaluate(
        """() => [getComputedStyle(document.querySelector("#prompt"), "::placeholder").color,
                  getComputedStyle(document.querySelector(".composer")).backgroundColor]"""
    )
    assert contrast(ink, paper) >= 4.5


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_answers_show_tables_code_maths_and_both_directions(any_page, chat):
    page = any_page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    start(page, chat, "table")
    cells = page.locator(".answer").first.locator("td")
    line = cells.first.evaluate("(cell) => parseFloat(getComputedStyle(cell).lineHeight)")
    for cell in cells.all():
        assert cell.bounding_box()["height"] < 2 * line, "a number is broken"
    send(page, "arabic", 2)
    answered(page)
    paragraph = page.locator(".turn:last-child .answer .text p").first
    assert paragraph.evaluate("(each) => getComputedStyle(each).direction") == "rtl"
    send(page, "code", 3)
    answered(page)
    code = page.locator(".turn:last-child .answer").first.locator(".code")
    plain, keyword = (
        code.locator(each).first.evaluate("(each) => getComputedStyle(each).color") for each in ("code", ".k")
    )
    assert plain != keyword
    code.get_by_role("button", name="Copy").click()
    expect(code.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return x < 1  # less\n"
    send(page, "maths", 4)
    answered(page)
    formulas = page.locator(".turn:last-child .answer").first.locator("math")
    assert formulas.count() == 2
    assert formulas.last.locator("mfrac").count() == 1


def test_too_long_says_what_helps(any_page, chat):
    page = any_page
    start(page, chat)
    send(page, "this is too long", 2)
    notice = page.locator(".turn:last-child .answer .notice").first
    expect(notice).to_contain_text(TOO_LONG)
    expect(notice).to_contain_text("Start a new conversation, or edit an earlier message")
    assert page.locator(".turn:last-child").get_by_role("button", name="Regenerate").count() == 0
    page.get_by_role("link", name="New conversation with this message").first.click()
    assert page.input_value("#prompt") == "this is too long"


def test_the_first_screen_names_each_model_once_and_the_base_as_base(page, chat):
    page.goto(chat.url)
    assert page.locator("#chosen").inner_text() == "tuned beside plain"
    options = [each.strip() for each in page.locator("#models select").first.locator("option").all_inner_texts()]
    assert options == ["tuned", "other", "plain (base)"]
    page.locator("[data-say]").first.click()
    page.wait_for_url("**/chat/*/")
    expect(page.locator(".answer.done")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator(".answer .tag")).to_have_text(["base"])


def test_up_to_four_answer_with_a_system_message(page, chat, talker):
    page.goto(chat.url)
    page.click(".chosen")
    selects = page.locator("#models select")
    selects.nth(2).select_option("other")
    page.fill("[name=system]", "Answer like a pirate.")
    page.fill("[name=preset]", "pirate")
    page.get_by_role("button", name="Save these").click()
    expect(page.locator("#presets")).to_contain_text("Saved as")
    page.fill("[name=system]", "")
    page.get_by_role("button", name="pirate").click()
    assert page.input_value("[name=system]") == "Answer like a pirate."
    page.keyboard.press("Escape")
    talker[1].asked.clear()
    send(page, "Ahoy", 1)
    expect(page.locator(".answer.done")).to_have_count(3, timeout=PATIENCE)
    assert {each["model"] for each in talker[1].asked} == {"tuned", "plain", "other"}
    assert all(
        each["messages"][0] == {"role": "system", "content": "Answer like a pirate."} for each in talker[1].asked
    )


def test_an_answer_that_was_cut_off_goes_on(page, chat, talker):
    start(page, chat, "cut me")
    first = page.locator(".answer").first
    first.get_by_role("button", name="Continue").click()
    expect(page.locator(".answer").first.locator(".text")).to_contain_text(
        "You said: cut me and so on.", timeout=PATIENCE
    )
    asked = talker[1].asked[-1]
    assert asked["messages"][-1] == {"role": "assistant", "content": "You said: cut me"}
    assert (asked["continue_final_message"], asked["add_generation_prompt"]) == (True, False)


def test_thumbs_are_votes_that_can_be_withdrawn(page, chat):
    start(page, chat)
    first = page.locator(".answer").first
    up, down = (first.get_by_role("button", name=name) for name in ("Good answer", "Bad answer"))
    up.click()
    expect(up).to_have_attribute("aria-pressed", "true")
    down.click()
    expect(down).to_have_attribute("aria-pressed", "true")
    expect(up).to_have_attribute("aria-pressed", "false")
    page.reload()
    expect(down).to_have_attribute("aria-pressed", "true")
    exported = get(f"{page.url}export?format=json").json()
    assert [each["thumb"] for each in exported["turns"][0]["answers"]] == ["down", None]
    down.click()
    expect(down).to_have_attribute("aria-pressed", "false")


def test_a_conversation_is_renamed_pinned_exported_and_reached_by_keyboard(page, chat):
    start(page, chat, "What is a heron?")
    page.get_by_role("button", name="Rename this conversation").click()
    page.fill("[name=title]", "Birds")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Birds")
    page.get_by_role("button", name="Pin this conversation").click()
    expect(page.get_by_role("button", name="Unpin this conversation")).to_be_visible()
    address = page.url
    start(page, chat, "a later one")
    assert "Birds" in page.locator("#conversations li").first.inner_text()
    text = get(f"{address}export")
    assert text.headers["Content-Disposition"] == 'attachment; filename="birds.md"'
    assert text.text.startswith("# Birds\n\n**You:** What is a heron?\n\n**tuned** (`")
    page.locator("h1").click()
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    expect(page.locator("#prompt")).to_be_focused()
    page.locator("h1").click()
    page.keyboard.press("e")
    expect(page.locator(".edit textarea")).to_be_focused()


def test_the_colours_are_the_persons_choice(page, chat):
    page.emulate_media(color_scheme="light")
    page.goto(chat.url)
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(paper)
    switch = page.locator("[data-theme-switch]")
    switch.click()
    switch.click()
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark
    assert page.get_attribute("html", "data-theme") == "dark"


def test_a_form_that_is_wrong_is_refused_in_words(chat):
    with Client(base_url=chat.url) as client:
        token = re.search(r'csrfmiddlewaretoken" value="(\w+)"', client.get("/").text)[1]
        form = {"csrfmiddlewaretoken": token, "prompt": "x", "model": "plain", "top_p": 1, "max_tokens": 5}
        headers = {"Referer": chat.url}
        wrong = client.post("/chat/say", data={**form, "temperature": "warm"}, headers=headers)
        assert (wrong.status_code, wrong.text) == (400, "Temperature: Enter a number.")
        many = client.post("/chat/say", data={**form, "temperature": 1, "model": list("abcde")}, headers=headers)
        assert (many.status_code, many.text) == (400, "Choose at most 4 models.")


# Up to the middle of a text, or to the end of an element that takes room.
_PIECES = re.compile(rb".+?(?:>\s*[^\s<]{3,}(?=\s[^<]{5})|</(?:h1|h2|p|button|a|label|form|div|li|footer)>|\Z)", re.S)


@contextmanager
def arriving_slowly(url: str) -> Iterator[str]:
    """The same site behind a connection that brings its pages piece by piece, with a cut wherever one could show."""

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = get(url + self.path)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            page = "text/html" in answer.headers["Content-Type"]
            for piece in _PIECES.findall(answer.content) if page else [answer.content]:
                self.wfile.write(piece)
                time.sleep(0.02 if page else 0)  # a frame

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


SHIFTS = """
    window.shifts = [];
    new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
        const moved = entry.sources.map(({node}) => (node?.outerHTML ?? node?.textContent)?.slice(0, 90));
        if (!entry.hadRecentInput) window.shifts.push([entry.value, ...moved]);
    })).observe({type: "layout-shift", buffered: true});
"""


@pytest.mark.parametrize("width", [1440, 768, 390])
def test_layout_does_not_shift(browser, chat, width):
    with watched(browser, width, 900) as page:
        page.add_init_script(SHIFTS)
        page.goto(chat.url)
        page.wait_for_timeout(300)
        assert page.evaluate("window.shifts") == []
        send(page, "long", 1)
        answered(page)
        page.reload()
        page.wait_for_timeout(300)
        assert page.evaluate("window.shifts") == []
        with arriving_slowly(chat.url) as slow:  # every part of the page has its place before its contents are here
            for address in (page.url.replace(chat.url, slow), slow):
                page.goto(address)
                page.wait_for_timeout(300)
                assert page.evaluate("window.shifts") == []
