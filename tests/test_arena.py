"""The arena: nothing shows which model is which before the vote, and no vote that was acknowledged is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from site_server import NEEDS_CHROMIUM, PATIENCE, Client, Site, get, serving, watched
from talker import ADAPTER, BASE, Talker, talking

pytestmark = NEEDS_CHROMIUM

# Names that no page contains by chance.
MODELS = {"zebu": f"{BASE}+{ADAPTER}", "xerus": f"{BASE}+{'c' * 16}", "yak": BASE}
NAMES = list(MODELS)
GIVEN_AWAY = [*NAMES, BASE, ADAPTER, "c" * 16]


@pytest.fixture(scope="module")
def talker() -> Iterator[tuple[str, Talker]]:
    with pytest.MonkeyPatch.context() as patched, talking() as (address, server):
        patched.setattr("talker.MODELS", MODELS)
        yield address, server


@pytest.fixture
def said(talker) -> Iterator[Talker]:
    """The stand-in, whose models give different answers at different speeds."""
    server = talker[1]
    server.says = {
        "zebu": "A short answer, given slowly.",
        "xerus": "An answer of some more words, which comes at once, all of it.",
        "yak": "word " * 60,
    }
    server.paces = {"zebu": 0.15, "yak": 0.02}
    yield server
    server.says, server.paces = {}, {}


@pytest.fixture(scope="module")
def arena(talker, tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("arena")
    (folder / "runs").mkdir()
    with serving(folder / "runs", folder / "data", "--backend", talker[0]) as site:
        yield site


def ask(page: Page, arena: Site, words: str = "What is a lighthouse for?") -> None:
    page.goto(f"{arena.url}/arena/")
    page.fill("#question", words)
    page.click("#ask-send")
    page.wait_for_url("**/arena/*/")
    expect(page.locator("#ballot:not([inert])")).to_be_visible(timeout=PATIENCE)


def test_a_vote_by_keyboard_shows_who_they_were(any_page, arena, said):
    page = any_page
    ask(page, arena)
    expect(page.locator(".answer .model")).to_have_text(["Left", "Right"])
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", name=re.compile("You preferred"))).to_be_visible()
    names = page.locator(".answer .model").all_text_contents()
    assert set(names) < set(NAMES)
    expect(page.locator(".answer.won .model")).to_have_text(names[1])
    page.keyboard.press("n")
    page.wait_for_url("**/arena/")


@pytest.mark.parametrize(("key", "told"), [("t", "A tie"), ("b", "Neither was good")])
def test_ties_and_neither(page, arena, said, key, told):
    ask(page, arena)
    page.fill("[name=reason]", "They are alike.")
    page.locator("#ballot legend").click()  # out of the field
    page.keyboard.press(key)
    expect(page.get_by_role("heading", name=told)).to_be_visible()
    expect(page.get_by_text("They are alike.")).to_be_visible()


def test_a_vote_is_withdrawn_and_stays_on_record(page, arena, said):
    ask(page, arena)
    page.keyboard.press("ArrowLeft")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Withdraw this vote").click()
    page.wait_for_url("**/arena/")
    last = json.loads(get(f"{arena.url}/arena/votes.jsonl").text.splitlines()[-1])
    assert last["withdrawn"]
    assert last["outcome"] == "left"
    page.go_back()
    page.reload()
    expect(page.get_by_role("heading", name="This vote was withdrawn")).to_be_visible()
    expect(page.locator("#ballot")).to_have_count(0)  # the names are known, so there is no second vote


def test_enter_in_the_reason_does_not_choose(page, arena, said):
    ask(page, arena)
    page.fill("[name=reason]", "The right one is kinder.")
    page.press("[name=reason]", "Enter")
    page.wait_for_timeout(300)
    expect(page.locator("#ballot")).to_be_visible()
    page.get_by_role("button", name="Right").click()
    expect(page.get_by_role("heading", name=re.compile("You preferred"))).to_be_visible()
    vote = json.loads(get(f"{arena.url}/arena/votes.jsonl").text.splitlines()[-1])
    assert (vote["outcome"], vote["reason"]) == ("right", "The right one is kinder.")


def test_one_vote_for_each_match_and_only_on_what_was_shown(page, arena, said):
    ask(page, arena)
    number = re.search(r"/arena/(\d+)/", page.url).group(1)
    client = Client(base_url=arena.url)
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', client.get("/arena/").text).group(1)
    sent = {"outcome": "left", "csrfmiddlewaretoken": token}
    late = client.post(f"/arena/{number}/vote", data={**sent, "turn": "1"})
    assert (late.status_code, "not the last answers" in late.text) == (400, True)
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", name=re.compile("You preferred"))).to_be_visible()
    other = client.post(f"/arena/{number}/vote", data=sent)
    assert (other.status_code, "Somebody else has voted" in other.text) == (400, True)


def test_thumbs_of_two_people_both_stand(page, arena, said):
    page.goto(arena.url)
    page.fill("#prompt", "Whose?")
    page.click("#send")
    page.wait_for_url("**/chat/*/")
    expect(page.locator(".answer.done")).to_have_count(2, timeout=PATIENCE)
    number = page.locator(".answer").first.get_attribute("id").removeprefix("answer-")
    for _ in range(2):
        client = Client(base_url=arena.url)
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', client.get("/arena/").text).group(1)
        client.post(f"/answers/{number}/vote", data={"up": "1", "csrfmiddlewaretoken": token})
    votes = [json.loads(line) for line in get(f"{arena.url}/arena/votes.jsonl").text.splitlines()][-2:]
    assert [(vote["outcome"], vote["withdrawn"]) for vote in votes] == [("up", None)] * 2
    assert votes[0]["voter"] != votes[1]["voter"]


def test_several_turns_and_a_skip(page, arena, said):
    ask(page, arena)
    page.fill("#question", "And at night?")
    page.click("#ask-send")
    expect(page.locator(".turn")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator("#ballot:not([inert])")).to_be_visible(timeout=PATIENCE)
    sent = said.asked[-1]["messages"]
    assert [turn["role"] for turn in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"] == said.says[said.asked[-1]["model"]]  # each model goes on from its own answer
    page.keyboard.press("s")
    page.wait_for_url("**/arena/")


def test_a_vote_says_everything_that_is_needed_to_trust_it(page, arena, said):
    ask(page, arena, "What is rain?")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("heading", name=re.compile("You preferred"))).to_be_visible()
    vote = json.loads(get(f"{arena.url}/arena/votes.jsonl").text.splitlines()[-1])
    assert (vote["kind"], vote["outcome"], vote["withdrawn"]) == ("arena", "left", None)
    assert vote["prompt"] == [{"role": "user", "content": "What is rain?"}]
    for answer in vote["answers"]:
        assert answer["text"] == said.says[answer["model"]].strip() or answer["text"] == said.says[answer["model"]]
        assert answer["fingerprint"] == MODELS[answer["model"]]
        assert answer["sampling"] == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 512}
        assert answer["finish"] == "stop"
    assert re.fullmatch("[0-9a-f]{16}", vote["voter"])


@pytest.mark.parametrize("round_", range(3))
def test_nothing_that_the_browser_gets_tells_which_is_which(browser, arena, said, round_):
    bodies: list[str] = []
    with watched(browser, 1440, 900) as page:
        page.on("response", lambda got: bodies.append(got.url + json.dumps(got.headers)))
        ask(page, arena)
        bodies.append(page.content())
        number = re.search(r"/arena/(\d+)/", page.url).group(1)
        turn = page.get_attribute("[name=turn]", "value")
        cookies = page.context.cookies()
        client = Client(base_url=arena.url, cookies={each["name"]: each["value"] for each in cookies})
        # The pages of chats do not show the match either.
        for other in (f"/chat/{number}/", f"/chat/{number}/export", f"/chat/{number}/export?format=json"):
            assert client.get(other).status_code == 404
        assert "match in the arena" not in client.get("/chat/search?q=").text
        assert client.get(f"/turns/{turn}/events").status_code == 404
        bodies += [client.get(f"/arena/{number}/").text, client.get(f"/arena/{number}/events").text]
    told = "\n".join(bodies)
    assert "/arena/" in told
    for name in GIVEN_AWAY:
        assert not re.search(rf"\b{name}\b", told), name


def test_both_answers_appear_at_one_pace(arena, said):
    """The slow model's answer is as long as the quick one's at every moment, until one of them ends."""
    client = Client(base_url=arena.url)
    for _ in range(4):
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', client.get("/arena/").text).group(1)
        began = client.post("/arena/start", data={"prompt": "Go", "csrfmiddlewaretoken": token})
        lengths = {"left": 0, "right": 0}
        moments = []
        with client.stream("GET", f"{began.headers['location']}events") as stream:
            lines = stream.iter_lines()
            for line in lines:
                if line.startswith("event: ") and (side := line.removeprefix("event: ")) in lengths:
                    html = json.loads(next(lines).removeprefix("data: "))["html"]
                    lengths[side] = len(re.sub("<[^>]+>|\\s+", "", html))
                    moments.append(dict(lengths))
                elif line == "event: over":
                    break
        ends = {side: max(moment[side] for moment in moments) for side in lengths}
        open_ = [each for each in moments[1::2] if all(each[side] < ends[side] for side in ends)]
        assert all(abs(each["left"] - each["right"]) <= 12 for each in open_)  # a tick, and white space


def test_a_vote_before_both_are_written_is_refused(arena, said):
    client = Client(base_url=arena.url)
    said.paces = dict.fromkeys(NAMES, 0.5)
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', client.get("/arena/").text).group(1)
    began = client.post("/arena/start", data={"prompt": "Slowly", "csrfmiddlewaretoken": token})
    voted = client.post(f"{began.headers['location']}vote", data={"outcome": "left", "csrfmiddlewaretoken": token})
    assert voted.status_code == 400
    assert "Both answers must be there before you vote" in voted.text
    assert client.post("/arena/start", data={"prompt": " ", "csrfmiddlewaretoken": token}).status_code == 400


def test_better_beside_another_and_better_than_before(page, arena, said):
    page.goto(arena.url)
    page.fill("#prompt", "Which?")
    page.click("#send")
    page.wait_for_url("**/chat/*/")
    expect(page.locator(".answer.done")).to_have_count(2, timeout=PATIENCE)
    page.get_by_role("button", name="This one is better").nth(1).click()
    expect(page.get_by_role("button", name="This one is better", pressed=True)).to_have_count(1)
    vote = json.loads(get(f"{arena.url}/arena/votes.jsonl").text.splitlines()[-1])
    assert (vote["kind"], vote["outcome"], len(vote["answers"])) == ("side by side", "right", 2)
    other = page.get_by_role("button", name="This one is better").nth(0)
    other.click()  # a changed mind
    expect(other).to_have_attribute("aria-pressed", "true", timeout=PATIENCE)
    expect(page.get_by_role("button", name="This one is better", pressed=True)).to_have_count(1)
    votes = [json.loads(line) for line in get(f"{arena.url}/arena/votes.jsonl").text.splitlines()][-2:]
    assert [bool(vote["withdrawn"]) for vote in votes] == [True, False]
    assert votes[1]["outcome"] == "left"


def test_standings_and_pairs_to_train_on(page, arena, said):
    for key in ("ArrowLeft", "ArrowRight", "ArrowLeft"):
        ask(page, arena, f"Question {key}")
        page.keyboard.press(key)
        expect(page.get_by_role("heading", name=re.compile("You preferred"))).to_be_visible()
    page.get_by_role("link", name="Standings").last.click()
    expect(page.locator("tbody tr")).not_to_have_count(0)
    expect(page.get_by_text(re.compile("pairs? to train on"))).to_be_visible()
    expect(page.locator("svg.interval")).not_to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 768, 390])
def test_the_arena_can_be_used_by_everybody(browser, arena, said, width, scheme):
    """No rule of axe is violated, and nothing is wider than the screen, before and after the vote."""
    with watched(browser, width, 900) as page:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")

        def look() -> None:
            found = Axe().run(page).response["violations"]
            assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        page.goto(f"{arena.url}/arena/")
        look()
        ask(page, arena)
        look()
        page.keyboard.press("ArrowLeft")
        expect(page.get_by_role("heading", name=re.compile("You preferred"))).to_be_visible()
        look()
        page.get_by_role("link", name="Standings").last.click()
        expect(page.get_by_role("heading", name="Standings", exact=True)).to_be_visible()
        look()
