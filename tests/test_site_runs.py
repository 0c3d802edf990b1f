"""Runs on the site: from a file to a run, stopping and going on, what a run's page says, its charts and pairs."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from conftest import make_pair, small_run, write_pairs
from playwright.sync_api import Page, expect
from site_server import NEEDS_CHROMIUM, PATIENCE, Site, get, say, wait_done, watched

from pairtune.run.folder import Run

pytestmark = NEEDS_CHROMIUM


def choose(page: Page, site: Site, model: Path, source: str) -> None:
    """The first step of a new run, with data that lies on this machine."""
    page.goto(f"{site.url}/runs/new")
    page.fill("[name=source]", source)
    page.fill("[name=model]", str(model))
    page.get_by_role("button", name="Look at the data").click()


def wait_for(what, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.3)


def start_run(page: Page, name: str, **settings: str) -> None:
    page.fill("[name=name]", name)
    page.locator("details", has=page.locator("[name=samples]")).evaluate("(each) => { each.open = true; }")
    for key, value in {"learning_rate": "1e-3", "epochs": "1", "samples": "2", **settings}.items():
        page.fill(f"[name={key}]", value)
    page.get_by_role("button", name="Start").click()


def test_data_that_is_missing_is_told_at_once_at_its_field(any_page, site, tiny_model):
    page = any_page
    choose(page, site, tiny_model, "missing.jsonl")
    field = page.locator(".field", has=page.locator("[name=source]"))
    expect(field.locator(".fault")).to_have_text("No such file or folder.")
    page.fill("[name=source]", "")
    page.get_by_role("button", name="Look at the data").click()
    expect(field.locator(".fault")).to_have_text("Choose a file, or write where the data is.")


def test_a_file_of_thumbs_gets_the_loss_that_it_needs(page, site, runs, tiny_model):
    rows = [half.conversational() for number in range(60, 72) for half in make_pair(number).halves()[number % 2 :]]
    file = runs.parent / "thumbs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choose(page, site, tiny_model, str(file))
    expect(page.locator("#check")).to_contain_text("18 answers from 18 rows of TRL unpaired", timeout=PATIENCE)
    expect(page.locator("#check pre").first).to_contain_text("desirable: Yes, 60 of them.")
    expect(page.locator("[name=loss]")).to_have_value("kto")
    start_run(page, "thumbs")
    page.wait_for_url("**/runs/thumbs/", timeout=PATIENCE)
    expect(page.locator("h1 .state")).to_have_text("finished", timeout=PATIENCE)
    expect(page.locator("main")).to_contain_text(
        "comparisons of a desirable with an undesirable answer", timeout=PATIENCE
    )
    expect(page.locator("#hurt")).to_contain_text("the model moved against the label", timeout=PATIENCE)
    page.goto(f"{site.url}/runs/thumbs/pairs")
    expect(page.locator(".pair h2").first).to_have_text(re.compile("Desirable|Undesirable"))
    page.locator(".pair").first.get_by_role("button", name="Wrong way round").click()
    expect(page.locator(".pair").first).to_contain_text(
        "label turned round in a run with these marks", timeout=PATIENCE
    )


def test_wrong_settings_are_told_at_their_fields_in_plain_words(any_page, site, runs, tiny_model):
    page = any_page
    choose(page, site, tiny_model, str(write_pairs(runs.parent / "plain.jsonl", range(60, 72))))
    page.wait_for_url("**/runs/new/*/")
    start_run(page, "my run!", learning_rate="banana", beta="0", samples="some", epochs="1.5")
    faults = {
        field.locator("input").first.get_attribute("name"): field.locator(".fault").all_inner_texts()
        for field in page.locator(".field.wrong").all()
    }
    assert faults == {
        "name": ["Use letters, digits, hyphens, dots and underscores, beginning with a letter or digit."],
        "learning_rate": ["Write numbers, separated by commas; “banana” is not."],
        "epochs": ["Write whole numbers, separated by commas; “1.5” is not."],
        "samples": ["Write a whole number; “some” is not."],
    }
    assert not re.search("--[a-z]|slug|could not convert", page.locator("main").inner_text())
    start_run(page, "small", beta="0")
    expect(page.locator(".field.wrong .fault").first).to_be_visible()
    said = page.locator(".field.wrong .fault").all_inner_texts()
    assert said == ["There is already a run named small.", "Must be greater than 0, not 0."]


def test_a_file_is_uploaded_its_columns_named_by_clicking_and_tuned_on(page, site, runs, tiny_model):
    rows = [make_pair(number) for number in range(100, 130)]
    table = ["question,one,two,better"]
    for number, pair in enumerate(rows):
        first, second = (pair.chosen, pair.rejected) if number % 2 else (pair.rejected, pair.chosen)
        answers = (pair.prompt[0]["content"], first, second, "left" if number % 2 else "right")
        table.append(",".join(f'"{each}"' for each in answers))
    page.goto(f"{site.url}/runs/new")
    upload = {"name": "my own.csv", "mimeType": "text/csv", "buffer": "\n".join(table).encode()}
    page.set_input_files("[type=file]", upload)
    page.fill("[name=model]", str(tiny_model))
    page.get_by_role("button", name="Look at the data").click()
    expect(page.locator("#check .notice")).to_contain_text("in no known format; it has question, one, two, better")
    assert "--" not in page.locator("#check .notice").inner_text()
    assert "Are there 100 apples?" in page.locator(".mapping").inner_text()
    for column, part in enumerate(("prompt", "answer_a", "answer_b", "label")):
        page.locator(".mapping select").nth(column).select_option(part)
    page.fill("[name=label_a]", "left")
    page.fill("[name=label_b]", "right")
    page.get_by_role("button", name="Read it like this").click()
    expect(page.locator("#check .state")).to_have_text("not confirmed", timeout=PATIENCE)
    example = page.locator(".example").first.inner_text()
    assert "chosen: Yes, 100 of them." in example
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#settings .notice")).to_contain_text("Say first which answer is the better one")
    page.get_by_role("button", name="Yes, it is").click()
    expect(page.locator("#check .state")).to_have_text("ok with warnings", timeout=PATIENCE)
    expect(page.locator("#cost")).to_contain_text("GB of memory", timeout=PATIENCE)
    start_run(page, "uploaded")
    page.wait_for_url("**/runs/?started=uploaded")
    expect(page.locator("main")).to_contain_text("uploaded")
    page.wait_for_url("**/runs/uploaded/", timeout=PATIENCE)  # as soon as there is one
    wait_for((runs / "uploaded" / "COMPLETE").is_file)
    record = json.loads((runs / "uploaded" / "data.json").read_text())
    assert sum(each["kept"] for each in record["sources"]) == 30
    expect(page.locator("h1 .state")).to_have_text("finished", timeout=PATIENCE)  # the page has followed by itself
    page.goto(f"{site.url}/runs/")
    expect(page.locator("#runs-body tr", has_text="uploaded").locator(".state")).to_have_text(
        "finished", timeout=PATIENCE
    )
    expect(page.locator("main")).not_to_contain_text("starting")


def test_a_run_is_stopped_resumed_and_cloned(page, site, runs, tiny_model):
    data = write_pairs(runs.parent / "many.jsonl", range(200, 260))
    choose(page, site, tiny_model, str(data))
    page.wait_for_url("**/runs/new/*/")
    start_run(page, "stopped", epochs="40")
    page.wait_for_url("**/runs/stopped/", timeout=PATIENCE)
    wait_for(lambda: any((runs / "stopped" / "trials").glob("*/evals/epoch-1.parquet")))
    expect(page.locator("#live")).to_contain_text(re.compile(r"about .* left"), timeout=PATIENCE)
    expect(page.locator("#live")).to_contain_text("GB of memory")
    progress = json.loads((runs / "stopped" / "progress.json").read_text())
    page.get_by_role("button", name="Stop").click()
    wait_for(lambda: not psutil.pid_exists(progress["pid"]) or psutil.Process(progress["pid"]).status() == "zombie")
    expect(page.locator("h1 .state")).to_have_text("interrupted", timeout=PATIENCE)  # the page sees it by itself
    steps = len((next((runs / "stopped" / "trials").iterdir()) / "metrics.jsonl").read_text().splitlines())
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("h1 .state")).to_have_text("running", timeout=PATIENCE)
    metrics = next((runs / "stopped" / "trials").iterdir()) / "metrics.jsonl"
    wait_for(lambda: len(metrics.read_text().splitlines()) > steps + 5)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("h1 .state")).to_have_text("interrupted", timeout=PATIENCE)
    page.get_by_role("button", name="Clone").click()
    page.wait_for_url("**/runs/new/*/")
    assert page.input_value("[name=epochs]") == "40"
    assert page.input_value("[name=learning_rate]") == "0.001"
    assert "many.jsonl" in page.locator("h1").inner_text()


def test_a_clone_keeps_weights_and_columns_of_single_sources(page, site, runs, kept, tiny_model):
    folder = runs.parent
    renamed = [line.replace('"prompt"', '"question"') for line in write_pairs(folder / "a.jsonl", range(8)).open()]
    (folder / "renamed.jsonl").write_text("".join(renamed))
    plain = write_pairs(folder / "plain-one.jsonl", range(300, 308))
    columns = {"prompt": "question"}
    sources = [
        {"source": str(folder / "renamed.jsonl"), "weight": 2, "columns": columns},
        {"source": str(plain), "weight": 1},
    ]
    small_run(tiny_model, folder, data=sources, samples=0, accept_columns=True, out=runs / "mixed")
    page.goto(f"{site.url}/runs/mixed/")
    page.get_by_role("button", name="Clone").click()
    page.wait_for_url("**/runs/new/*/")
    expect(page.locator("#check .state").first).to_be_visible(timeout=PATIENCE)
    number = page.url.rstrip("/").rpartition("/")[2]
    assert yaml.safe_load((kept / "drafts" / f"{number}.yaml").read_text())["data"] == sources


def test_a_job_that_fails_after_its_start_says_why(page, site, runs, tiny_model):
    data = write_pairs(runs.parent / "gone.jsonl", range(60, 72))
    choose(page, site, tiny_model, str(data))
    page.wait_for_url("**/runs/new/*/")
    page.get_by_text("More settings").click()
    page.fill("[name=max_length]", "16")  # no pair fits
    page.fill("[name=name]", "hopeless")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/runs/?started=hopeless")
    expect(page.locator("main")).to_contain_text("did not start", timeout=PATIENCE)
    expect(page.locator("pre")).to_contain_text("error:")
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator("main")).not_to_contain_text("hopeless")


def test_the_verdict_comes_first_and_what_was_hurt_one_click_away(any_page, site, runs):
    page = any_page
    page.goto(f"{site.url}/runs/small/")
    height = page.viewport_size["height"]
    assert page.locator("#verdict .lead").bounding_box()["y"] < height / 2
    assert re.search(
        r"(Better|Not shown to be better) than its base.*\d+% of 4 pairs", page.locator(".lead").inner_text()
    )
    page.get_by_role("link", name=re.compile("^Where tuning hurt")).click()
    assert page.url.endswith("#hurt")
    margins = json.loads((runs / "small" / "regressions.json").read_text())
    assert f"On {margins['count']} of 4 test pairs" in page.locator("#hurt").inner_text()
    for text in (page.locator("main").inner_text(), get(f"{site.url}/runs/small/report").text):
        assert not re.search(r"\bwin rate|\bwins?\b|\bwon\b", text)
    report = get(f"{site.url}/runs/small/report").text
    assert report.index('href="#hurt"') < report.index('<section id="trials">') < report.index('<section id="hurt">')


def test_rules_are_named_for_what_they_count(site, runs):
    report = (runs / "small" / "report.html").read_text()
    assert "Faults of form against the base" in report
    assert "These are counts, not a judgement" in report


def test_charts_have_axes_a_base_intervals_and_lead_to_their_evaluation(any_page, site):
    page = any_page
    page.goto(f"{site.url}/runs/small/")
    figures = {each.locator("figcaption").inner_text(): each for each in page.locator("#curves figure").all()}
    accuracy = figures["Validation accuracy"]
    labels = [each for each in accuracy.locator("text").all_text_contents() if re.fullmatch(r"[\d.,]+", each)]
    values = [float(each) for each in labels[:-3]]
    assert len(values) >= 4
    assert 0 <= min(values) < max(values) <= 1
    assert "chance" in accuracy.locator("text").all_text_contents()
    assert "base" in figures["Validation loss"].locator("text").all_text_contents()
    assert figures["Validation loss"].locator(".band").count() == 2
    for text in page.locator("#curves text").all():
        box, frame = text.bounding_box(), text.locator("xpath=ancestor::*[name()='svg']").bounding_box()
        assert frame["x"] - 0.5 <= box["x"]
        assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 0.5, text.inner_html()
    point = figures["Validation loss"].locator("a .point").last
    point.scroll_into_view_if_needed()
    point.hover()
    expect(page.locator("#tip")).to_contain_text(re.compile(r"lr 0.0\d, beta 0.1, epoch 2: [\d.]+ \[[\d.]+, [\d.]+\]"))
    point.click()
    page.wait_for_url("**/runs/small/pairs?trial=lr-0.0*-beta-0.1&epoch=2")
    assert "epoch 2" in page.locator("main").inner_text()


def test_site_and_report_draw_the_same_charts(page, site):
    colour = "(line) => getComputedStyle(line).stroke"
    drawn = []
    for path in ("/runs/small/", "/runs/small/report"):
        page.goto(site.url + path)
        lines = page.locator("#curves .line")
        drawn.append([(line.get_attribute("points"), line.evaluate(colour)) for line in lines.all()])
    assert drawn[0] == drawn[1]


def test_runs_are_compared_sorted_filtered_and_annotated(page, site, runs):
    twin = runs / "twin"
    shutil.copytree(runs / "small", twin)
    try:
        page.goto(f"{site.url}/runs/twin/")
        page.fill("[name=text]", "the second one")
        page.fill("[name=tags]", "copy odd")
        with page.expect_navigation():
            page.get_by_role("button", name="Keep").click()
        page.goto(f"{site.url}/runs/")
        page.fill("[data-filters]", "odd")
        assert [row.get_attribute("hidden") is None for row in page.locator("#runs-body tr").all()].count(True) == 1
        page.fill("[data-filters]", "")
        page.get_by_role("button", name="Run", exact=True).click()
        names = [row.locator("a").first.inner_text() for row in page.locator("#runs-body tr").all()]
        assert names == sorted(names)
        page.get_by_label("Compare small").check()
        page.get_by_label("Compare twin").check()
        page.get_by_role("button", name="Compare").click()
        page.wait_for_url("**/runs/compare?**")
        text = page.locator("main").inner_text()
        assert "measured on the same held-out pairs" in text
        assert "Preference accuracy" in text
        assert page.locator(".charts figure").count() == 7
    finally:
        shutil.rmtree(twin)


def test_pairs_are_sorted_marked_as_wrong_and_their_edits_applied(page, site, kept):
    page.goto(f"{site.url}/runs/small/pairs?split=validation&order=margin")
    margins = [float(re.search(r"margin (-?[\d.]+)", text)[1]) for text in page.locator(".pair").all_inner_texts()]
    assert margins == sorted(margins)
    first, second = page.locator(".pair").first, page.locator(".pair").nth(1)
    dropped, swapped = (each.locator("header code").inner_text() for each in (first, second))
    assert first.locator("ins").count() and first.locator("del").count()
    page.get_by_label("Show differences").uncheck()
    assert first.locator("ins").first.evaluate("(each) => getComputedStyle(each).boxShadow") == "none"
    first.get_by_role("button", name="Wrong: leave it out").click()
    expect(first).to_contain_text("left out in a run")
    second.get_by_role("button", name="Wrong way round").click()
    expect(second).to_contain_text("answers swapped in a run")
    page.goto(f"{site.url}/runs/small/pairs")
    notice = page.locator("form.notice")
    expect(notice).to_contain_text("2 pairs marked")
    notice.get_by_role("button", name="Prepare such a run").click()
    page.wait_for_url("**/runs/new/*/")
    assert page.input_value("[name=epochs]") == "2"
    assert "held-" in page.locator("h1").inner_text() or "train.jsonl" in page.locator("h1").inner_text()
    (source,) = map(str, kept.rglob("held*.edits.json"))
    edits = json.loads(Path(source).read_text())
    assert {edit["action"] for edit in edits["edits"]} == {"drop", "swap"}
    assert all(edit["marked"] for edit in edits["edits"])

    from pairtune.config import Reading, SourceConfig
    from pairtune.data.preference import LeftOut
    from pairtune.data.source_reader import SourceReader

    reader = SourceReader.open(SourceConfig(source=source), "--data", Reading(), None)
    found = {f"{row.file.rpartition('/')[2]}:{row.number}": pair for row, pair in reader.parsed()}
    name = dropped.rpartition("/")[2]
    assert isinstance(found[name], LeftOut)
    assert found[swapped.rpartition("/")[2]].rejected.startswith("Yes, ")
    assert dict(reader.parser.notes) == {"pairs whose answers were swapped, as marked": 1}
    page.goto(f"{site.url}/runs/small/pairs?split=validation&marked=on")
    page.locator(".pair").first.get_by_role("button", name="Take the mark away").click()
    page.locator(".pair").nth(1).get_by_role("button", name="Take the mark away").click()


def test_near_copies_of_a_prompt_are_found(page, site):
    page.goto(f"{site.url}/runs/small/pairs")
    page.get_by_role("link", name="Near copies").first.click()
    expect(page.locator("main")).to_contain_text("with prompts related to")
    assert page.locator("#pairs .pair").count() >= 1


def test_a_model_is_exported_with_its_check_and_published_after_a_look_at_the_card(page, site, tmp_path):
    page.goto(f"{site.url}/runs/small/")
    page.get_by_role("button", name="Adapter (PEFT)").click()
    link = page.get_by_role("link", name="Download", exact=True)
    expect(link).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#export-job")).to_contain_text("same prompt tokens")
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == "small-adapter.zip"
    page.get_by_role("link", name="Publish on the Hub").click()
    assert "preference-tuned from tiny" in page.locator(".prose").inner_text()
    expect(page.locator(".notice")).to_contain_text("hf auth login")
    assert page.get_by_role("button", name="Publish").is_disabled()


PAGES = (
    *("/", "CHAT", "/runs/", "/runs/small/", "/runs/halfway/", "/runs/damaged/", "/runs/new", "/runs/small/pairs"),
    *("/runs/small/push", "/runs/compare?run=small&run=halfway", "/runs/small/report", "DRAFT", "/nowhere"),
)


# What reaches beyond the screen, if the page can be moved sideways at all.
TOO_WIDE = """document.scrollingElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll("body *")]
    .filter((each) => each.checkVisibility() && each.getBoundingClientRect().right > innerWidth)
    .map((each) => each.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("width", [1440, 768, 390])
def test_pages_are_accessible_and_as_wide_as_the_screen(browser, site, runs, tiny_model, width):
    with watched(browser, width, 900) as page:
        say(page, site, "Hi", compare=str(tiny_model))
        wait_done(page, 2)
        talk = page.url.removeprefix(site.url)
        choose(page, site, tiny_model, str(write_pairs(runs.parent / "axe.jsonl", range(60, 66))))
        page.wait_for_url("**/runs/new/*/")
        expect(page.locator("#check .state").first).to_be_visible(timeout=PATIENCE)
        draft = page.url.removeprefix(site.url)
        for path in PAGES:
            page.goto(site.url + {"CHAT": talk, "DRAFT": draft}.get(path, path))
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                found = [
                    (each["id"], each["nodes"][0]["html"][:200]) for each in Axe().run(page).response["violations"]
                ]
                assert not found, f"{path}, {scheme}: {found}"
            for size in (width, 320) if width == 390 else (width,):
                page.set_viewport_size({"width": size, "height": 900})
                assert not page.evaluate(TOO_WIDE), f"{path} at {size}"
            page.set_viewport_size({"width": width, "height": 900})


def test_old_runs_still_have_pages(page, site, runs):
    """A run of an earlier version has no progress and no regressions; its page shows what it has."""
    old = runs / "old"
    shutil.copytree(runs / "small", old)
    (old / "regressions.json").unlink()
    try:
        assert Run.open(old).regressions is None
        page.goto(f"{site.url}/runs/old/")
        assert re.search(r"On \d of 4 test pairs", page.locator("#hurt").inner_text())
    finally:
        shutil.rmtree(old)
