"""The report, the model card and `pairtune eval` on real small runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from html.parser import HTMLParser

import pytest
from conftest import pairtune, small_run, write_pairs
from huggingface_hub import ModelCard

from pairtune.config import source_name
from pairtune.report.phrases import duration
from pairtune.report.report_data import ReportData
from pairtune.report.verdict import verdict
from pairtune.report.write import draw_curves, write_report
from pairtune.run.folder import Run


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported")
    held = write_pairs(folder / "ten.jsonl", range(20, 30))
    return small_run(
        tiny_model, folder, eval_data=[str(held)], learning_rate=[3e-3, 1e-3], epochs=[2], out=folder / "my<run>"
    )


def test_answers_on_validation_prompts_can_choose(tiny_model, tmp_path):
    run = small_run(tiny_model, tmp_path, learning_rate=[3e-3, 1e-3], samples=3, select="fewer_faults")
    choosing, generations, selection = (
        json.loads(path.read_text()) for path in (run.paths.choosing, run.paths.generations, run.paths.selection)
    )
    asked = [prompt[-1]["content"] for prompt in choosing["prompts"]]
    assert asked == [f"Are there {number} apples?" for number in (20, 21, 22)]  # the choice sees no test prompt
    assert generations["prompts"][0][-1]["content"] == "Are there 40 apples?"
    rates = {name: model["win_rate"]["rate"] for name, model in choosing["models"].items() if name != "base"}
    assert selection["value"] == max(rates.values()) == rates[selection["winner"]]
    assert "on 3 validation prompts" in selection["why"]


def test_prompts_with_tools_are_not_answered_and_the_run_ends_well(tiny_model, tmp_path):
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    for name, numbers in (("train", range(8)), ("held", range(20, 25))):
        plain = write_pairs(tmp_path / f"{name}.jsonl", numbers).read_text().splitlines()
        rows = [json.dumps({**json.loads(line), "tools": [weather]}) + "\n" for line in plain]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    flags = ("--model", tiny_model, "--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "held.jsonl")
    flags = (*flags, "--lr", "1e-3", "--beta", "0.1", "--epochs", "1")
    refused = pairtune("tune", *flags, "--select", "fewer_faults", "--out", tmp_path / "refused")
    assert (refused.returncode, "--select fewer_faults: every validation prompt" in refused.stderr) == (2, True)
    assert not (tmp_path / "refused").exists()
    done = pairtune("tune", *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "no held-out prompt was answered: all of them come with tools" in done.stdout + done.stderr
    run = Run.finished(tmp_path / "run")
    assert run.generations is None
    assert 'id="answers"' not in run.paths.report.read_text()
    asked = pairtune("eval", run.root, "--data", tmp_path / "held.jsonl", "--samples", "3")
    assert (asked.returncode, asked.stderr.strip().splitlines()[-1]) == (
        2,
        "error: --samples 3: every prompt comes with tools, so that none can be answered in text; use --samples 0",
    )


class Page(HTMLParser):
    """The parts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img", "path", "use", "rect"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_file_that_needs_nothing_else(run):
    page = Page(run.paths.report.read_text())
    assert not page.open
    assert all(address.startswith("#") for address in page.addresses)
    anchors = [
        address for address in page.addresses if address in ("#trials", "#curves", "#answers", "#audit", "#data")
    ]
    assert len(anchors) == 5
    assert {anchor[1:] for anchor in anchors} <= set(page.ids)
    assert "script" not in page.tags
    assert "@import" not in run.paths.report.read_text()
    assert "url(http" not in run.paths.report.read_text()


def test_the_report_tells_what_a_stranger_asks(run):
    said = " ".join(" ".join(Page(run.paths.report.read_text()).text).split())
    selection, test = (json.loads(path.read_text()) for path in (run.paths.selection, run.paths.test))
    for expected in (
        "2 trials tuning tiny on 8 preference pairs",
        selection["why"],
        selection["verdict"][1:],
        f"On {test['pairs']} test pairs",
        "lr 0.003, beta 0.1",
        "KL from the base",
        "Answers to 2 held-out prompts",
        "Too few validation rows for the claim",
        "train: 8 rows of train.jsonl, 8 kept",
        "config.yaml --out NEW",
        f"Weights: {selection['best_fingerprint']}",
    ):
        assert expected in said, expected


def test_what_people_wrote_is_text_and_no_folder_of_theirs_is_named(run):
    html, text = run.paths.report.read_text(), run.paths.report_text.read_text()
    assert "my<run>" not in html
    assert "my&lt;run&gt;" in html
    for shown in (html, text, run.paths.card.read_text()):
        assert str(run.root.parent) not in shown


def test_a_report_written_again_says_the_same(run, tmp_path):
    shutil.copytree(run.root, tmp_path / "run")
    again = Run(tmp_path / "run")
    again.paths.complete.unlink()
    longer = timedelta(minutes=5, seconds=1.6)  # rounded up, never cut off
    ended = datetime.fromisoformat(again.environment.started) + longer
    write_report(again, ended)
    first = again.paths.report.read_bytes()
    again.mark_complete(ended)
    write_report(again)
    assert b"5 min 02 s in total" in first
    assert again.paths.report.read_bytes() == first


def test_an_answer_with_markup_stays_text(run, tmp_path):
    shutil.copytree(run.root, tmp_path / "run")
    spoilt = Run(tmp_path / "run")
    generations = json.loads(spoilt.paths.generations.read_text())
    for model in generations["models"].values():
        model["answers"][0]["text"] = "<script>alert(1)</script> [link](javascript:x) | `code`"
    spoilt.paths.generations.write_text(json.dumps(generations))
    write_report(spoilt)
    assert "script" not in Page(spoilt.paths.report.read_text()).tags
    assert (
        "\\<script\\>alert(1)\\</script\\> \\[link\\](javascript:x) \\| \\`code\\`"
        in spoilt.paths.report_text.read_text()
    )


def test_the_curves_are_all_there_and_speak(run):
    curves = draw_curves(ReportData(run))
    assert set(curves) == {"training-loss", "loss", "accuracy", "margin", "chosen", "rejected", "kl"}
    for name, svg in curves.items():
        assert svg.startswith('<svg class="chart" viewBox='), name
        assert "lr 0.003, beta 0.1:" in svg
        assert (name == "training-loss") != ("<title>" in svg)  # its points are means of several steps
        assert ('class="band' in svg) == (name not in ("training-loss", "kl"))
        assert ">base</text>" in svg or ">chance</text>" in svg
        assert (run.paths.figures / f"{name}.svg").is_file()
    assert curves == draw_curves(ReportData(run))


def test_the_card_has_what_the_hub_and_leaderboards_read(run):
    card = ModelCard.load(run.paths.card)
    data = card.data.to_dict()
    assert data["library_name"] == "peft"
    assert {"dpo", "pairtune", "lora"} <= set(data["tags"])
    (accuracy, loss) = card.data.eval_results
    assert (accuracy.metric_type, loss.metric_type, accuracy.dataset_split) == ("accuracy", "loss", "test")
    assert accuracy.metric_value == round(
        json.loads(run.paths.test.read_text())["metrics"]["eval_rewards/accuracies"], 4
    )
    assert "lr 0.001, beta 0.1" in card.text  # the losers are included
    assert not re.search(r"^## (Trials|Audit)", card.text, re.MULTILINE)  # one level below the card's own


def test_a_report_can_be_written_again_from_the_folder_alone(run, tmp_path):
    shutil.copytree(run.root, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "figures")
    command = [sys.executable, "-m", "pairtune", "report", tmp_path / "moved"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "moved" / "report.html")
    assert (tmp_path / "moved" / "figures" / "loss.svg").read_bytes() == (run.paths.figures / "loss.svg").read_bytes()
    (tmp_path / "moved" / "COMPLETE").unlink()
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, "unfinished" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("against", "accuracy", "said"),
    [
        ({"margin": 0.5, "p": 0.001, "better": True}, 0.75, "Better than its base on 75% of 4 pairs that it never saw"),
        ({"margin": -0.5, "p": 0.001, "better": False}, 0.25, "Worse than its base: 75% of 4 pairs"),
        ({"margin": 0.5, "p": 0.2, "better": False}, 0.75, "Not shown to be better than its base: 75% of 4 pairs"),
    ],
)
def test_the_verdict_says_no_more_than_the_numbers(run, tmp_path, against, accuracy, said):
    shutil.copytree(run.root, tmp_path / "run")
    copy = Run(tmp_path / "run")
    test = json.loads(copy.paths.test.read_text())
    test["against_base"], test["metrics"]["eval_rewards/accuracies"] = against, accuracy
    copy.paths.test.write_text(json.dumps(test))
    assert verdict(copy).sentence.startswith(said)
    assert "wins" not in verdict(copy).sentence
    counts = verdict(copy).hurt
    assert re.fullmatch(r"\d+ of 4 test pairs and \d+ of 2 answers", counts)


def test_words():
    assert duration(59.6) == "1 min 00 s"
    assert duration(3725) == "1 h 02 min"
    assert source_name("/home/me/pairs.jsonl.gz") == "pairs.jsonl.gz"
    assert source_name("pairs/mine.jsonl:12") == "mine.jsonl:12"
    assert source_name("data/of/mine@train") == "mine@train"
    assert source_name("Dahoas/rm-static@train") == "Dahoas/rm-static@train"
    assert source_name("bundled:concise") == "bundled:concise"


def test_eval_of_a_run_repeats_its_own_numbers(run):
    held = run.root.parent / "ten.jsonl"
    done = pairtune("eval", run.root, "--data", held, "--samples", 2, "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    best = json.loads(run.paths.selection.read_text())["ranking"][0]
    for name, value in record["metrics"].items():
        assert value == pytest.approx(best["metrics"][name], abs=1e-5), name
    assert record["intervals"]["eval_rewards/accuracies"] == best["intervals"]["eval_rewards/accuracies"]
    assert record["data"]["kept"] == record["pairs"] == 10
    assert record["answers"]["win_rate"]["ties"] + record["answers"]["win_rate"]["wins"] <= 2
    shown = pairtune("eval", run.root, "--data", held, "--samples", 2, "--dtype", "float32").stdout
    assert "faults of form" in shown
    assert "win rate" not in shown
    assert "The longer answer is better" in shown


def test_eval_takes_a_foreign_adapter_and_a_whole_model(run, tiny_model):
    held = run.root.parent / "ten.jsonl"
    of_run, of_adapter, of_model = (
        json.loads(pairtune("eval", *target, "--data", held, "--samples", 0, "--dtype", "float32", "--json").stdout)
        for target in ((run.root,), (run.paths.best,), (tiny_model, "--base", tiny_model))
    )
    assert of_adapter["metrics"] == pytest.approx(of_run["metrics"], abs=1e-6)
    assert of_model["metrics"]["eval_rewards/margins"] == 0
    assert of_model["metrics"]["eval_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--data", "HELD"], "--base: is required with"),
        (["MODEL", "--data", "nothing.jsonl"], "--data nothing.jsonl"),
        (["nothing", "--base", "MODEL", "--data", "HELD"], "MODEL nothing: not a local folder"),
        (["RUN", "--data", "HELD", "--judge", "http://127.0.0.1:9/v1"], "--judge-model: is required"),
        (
            ["RUN", "--data", "HELD", "--judge", "http://127.0.0.1:9/v1", "--judge-model", "x", "--samples", "1"],
            "--yes: is required if standard input is not a terminal; this would make 2 calls",
        ),
        (["RUN", "--data", "HELD", "--beta", "0"], "--beta: must be greater than 0"),
        (["RUN", "--data", "HELD", "--dtype", "int8"], "--dtype: should be auto"),
    ],
)
def test_what_eval_cannot_use_is_said(run, tiny_model, arguments, message):
    names = {"RUN": run.root, "MODEL": tiny_model, "HELD": run.root.parent / "ten.jsonl"}
    done = pairtune("eval", *(names.get(argument, argument) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
