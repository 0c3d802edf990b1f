"""The commands as functions: the same results as from the command line, shown as tables and charts."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import make_pair, pairtune, small_run, write_pairs
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig

import pairtune as library
from pairtune.api import _SOURCE, settings_of
from pairtune.config import SourceConfig
from pairtune.evaluation.audit.check import audit as check
from pairtune.evaluation.audit.own_runs import evidence_of_run
from pairtune.run.folder import Run
from pairtune.screen import screen
from pairtune.shown import Pairs, Result

TINY = {"learning_rate": 3e-3, "beta": 0.1, "epochs": 1, "dtype": "float32", "samples": 0}


@pytest.fixture(scope="module")
def result(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return Result(small_run(tiny_model, tmp_path_factory.mktemp("python"), learning_rate=[3e-3, 1e-3]))


def rows(numbers: range) -> list[dict]:
    return [make_pair(number).conversational() for number in numbers]


def test_importing_takes_nothing_with_it():
    heavy = "torch", "transformers", "datasets", "pydantic", "rich", "typer", "numpy"
    code = f"import sys, pairtune; print([name for name in {heavy} if name in sys.modules], pairtune.__version__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split(" ")[0] == "[]"


def test_every_public_name_is_there_and_has_a_docstring():
    for name in library.__all__:
        assert getattr(library, name).__doc__
    assert set(dir(library)) == set(library.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tuen'"):
        library.tuen  # noqa: B018


def test_pairs_are_read_counted_and_filtered(tmp_path: Path):
    table = tmp_path / "mine.csv"
    pd.DataFrame({"ask": ["1?", "2?", "3?"], "good": ["yes", "yes, two", "same"], "bad": ["no", "no", "same"]}).to_csv(
        table, index=False
    )
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    pairs = library.load_pairs(table, columns=columns, accept_columns=True, on_bad_row="skip")
    assert len(pairs) == 2
    assert pairs.account is not None
    assert (pairs.account.rows_in, pairs.account.kept, sum(pairs.account.dropped.values())) == (3, 2, 1)
    assert pairs[1]["chosen"] == [{"role": "assistant", "content": "yes, two"}]
    assert "2 rows kept of 3" in str(pairs)
    assert "yes, two" in pairs._repr_html_()
    long = pairs.where(lambda row: len(row["chosen"][0]["content"]) > 3)
    assert [row["origin"] for row in long] == [pairs[1]["origin"]]
    assert isinstance(pairs[:1], Pairs)
    saved = long.save(tmp_path / "long.jsonl")
    assert library.load_pairs(saved)[0]["chosen"] == pairs[1]["chosen"]


def test_markup_and_control_characters_in_pairs_are_only_shown():
    text = "<script>alert(1)</script>[bold]x[/bold]\x1b]0;owned\x07"
    pairs = Pairs([{"prompt": text, "chosen": "a", "rejected": "b"}], None, "chosen")
    shown = pairs._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "[bold]x[/bold]" in str(pairs)
    assert "\x1b" not in shown + str(pairs)


def test_a_source_that_cannot_be_read_is_one_line(tmp_path: Path):
    with pytest.raises(library.BadInput, match=r"nowhere\.jsonl"):
        library.load_pairs(tmp_path / "nowhere.jsonl")
    with pytest.raises(library.BadInput, match="--column choosen: is no part of a pair"):
        library.load_pairs("bundled:concise", columns={"choosen": "good"})


def test_the_doctor_says_what_the_command_says(tiny_model: Path, tmp_path: Path):
    source = write_pairs(tmp_path / "pairs.jsonl", range(12))
    report = library.inspect(source, model=str(tiny_model))
    told = pairtune("data", "inspect", source, "--model", tiny_model, "--json")
    assert json.loads(told.stdout) == json.loads(report.record.model_dump_json(by_alias=True))
    assert report.verdict in str(report)


@pytest.mark.parametrize("kind", ["list", "pairs", "dataset", "table"])
def test_rows_are_trained_on_like_a_file(tiny_model: Path, tmp_path: Path, kind: str):
    given = rows(range(12))
    data = {
        "list": lambda: given,
        "pairs": lambda: Pairs(given, None, "chosen"),
        "dataset": lambda: Dataset.from_list(given),
        "table": lambda: pd.DataFrame(given),
    }[kind]()
    result = library.tune(data, model=str(tiny_model), out=tmp_path / "runs" / kind, **TINY)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    same = library.tune(file, model=str(tiny_model), out=tmp_path / "runs" / "file", **TINY)
    drop = {"step_seconds", "train_seconds", "train_pairs_per_second", "peak_memory_mb"}
    numbers = [{name: value for name, value in row.items() if name not in drop} for row in result.trials]
    assert numbers == [{name: value for name, value in row.items() if name not in drop} for row in same.trials]
    kept = list((tmp_path / "runs").glob("pairs-*.jsonl"))
    assert len(kept) == 1
    assert library.resume(result.path).winner == result.winner


def test_what_is_wrong_with_rows_is_said_before_anything_is_written(tiny_model: Path, tmp_path: Path):
    out = tmp_path / "runs" / "run"
    with pytest.raises(library.BadInput, match="data: row 2 cannot be written as JSON"):
        library.tune([{"chosen": "a", "rejected": "b"}, {"chosen": b"a", "rejected": "b"}], out=out)
    with pytest.raises(library.BadInput, match="data: row 1 should be a mapping of columns, not int"):
        library.tune(iter([3]), out=out)
    with pytest.raises(library.BadInput, match=r"pairs-\w+\.jsonl: row 2: field rejected"):
        library.tune([*rows(range(1)), {"prompt": "a", "chosen": "b"}], out=tmp_path / "other" / "run")
    assert list(tmp_path.rglob("*.jsonl")) == []
    with pytest.raises(library.BadInput, match="--learning-rat: is not a setting"):
        library.tune(rows(range(4)), learning_rat=1e-4, out=out)
    with pytest.raises(library.BadInput, match="--data: is required"):
        library.tune(out=out)
    assert not out.parent.exists()


def test_rows_and_sources_are_told_apart(tmp_path: Path):
    file = str(write_pairs(tmp_path / "pairs.jsonl", range(8)))
    weighted = settings_of(None, {"data": [{"source": file, "weight": 2}], "out": tmp_path / "run"}).config
    assert weighted.data[0].weight == 2
    assert set(SourceConfig.model_fields) == _SOURCE
    named = [row | {"source": "a column of one's own"} for row in rows(range(8))]
    (kept,) = settings_of(None, {"data": named, "out": tmp_path / "run"}).config.data
    assert [json.loads(line) for line in Path(kept.source).read_text().splitlines()] == named


def test_several_processes_are_for_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(library.BadInput, match="accelerate launch -m pairtune tune"):
        library.tune("bundled:concise")


def test_a_result_has_the_numbers_of_its_run(result: Result):
    run = Run.finished(result.path)
    assert run.selection is not None
    assert result.winner == run.selection.winner
    assert result.verdict == run.selection.verdict
    assert len(result.trials) == 2
    (best,) = (row for row in result.trials if row["winner"])
    assert best["eval_loss"] == run.selection.value
    assert best["eval_loss_low"] <= best["eval_loss"] <= best["eval_loss_high"]
    table = pd.DataFrame(result.evaluations)
    assert list(table["trial"].unique()) == [row["name"] for row in result.trials]
    assert table["eval_loss"].min() == best["eval_loss"]
    assert result.test is not None
    assert result.test["pairs"] == 4
    assert len(result.answers) == 2
    assert library.open_run(result.path).winner == result.winner


def test_a_result_shows_its_tables_and_its_charts(result: Result):
    assert "Winner" in str(result)
    html = result._repr_html_()
    assert html.count("<svg") == len(result.charts) >= 3
    assert all("xmlns" in svg for svg in result.charts.values())


def test_the_winner_loads_with_its_tokenizer(result: Result):
    model, tokenizer = result.load()
    assert any("lora" in name for name, _ in model.named_parameters())
    assert tokenizer.chat_template


def test_evaluations_comparisons_and_audits_are_those_of_the_commands(tiny_model: Path, result: Result, tmp_path: Path):
    held = write_pairs(tmp_path / "held.jsonl", range(60, 72))
    arguments = ("--data", held, "--dtype", "float32", "--json")
    found = library.evaluate(result, held, samples=2, dtype="float32")
    told = json.loads(pairtune("eval", result.path, *arguments, "--samples", "2").stdout)
    assert told["metrics"] == found.record.model_dump(mode="json", by_alias=True)["metrics"]
    assert found.record.answers is not None
    assert "accuracy" in str(found).lower()

    compared = library.compare(tiny_model, result, held, dtype="float32")
    ended = pairtune("compare", tiny_model, result.path, *arguments)
    assert json.loads(ended.stdout)["outcome"] == compared.record.outcome
    assert ended.returncode == {"better": 0, "worse": 1}.get(compared.record.outcome, 2)

    audited = library.audit(result)
    assert audited.record.findings == check(evidence_of_run(result.path)).findings
    assert audited.verdict == result.audit().verdict
    assert [each["rule"] for each in audited] == [each["rule"] for each in audited.findings]


def test_a_judge_behind_an_endpoint_is_asked_only_if_that_is_agreed(result: Result, tmp_path: Path):
    class TooMuch(Exception):
        pass

    def refuse(cost: dict[str, int], judge: str) -> None:
        assert cost["calls"] > 0
        raise TooMuch(judge)

    held = write_pairs(tmp_path / "held.jsonl", range(60, 66))
    with pytest.raises(TooMuch):
        library.evaluate(
            result, held, samples=1, judge="http://127.0.0.1:9/v1", judge_model="judge", agree=refuse, dtype="float32"
        )


class TestFromTrl:
    """Settings of TRL's scripts."""

    def test_fields_become_settings(self, tmp_path: Path):
        args = DPOConfig(
            output_dir=str(tmp_path / "out"),
            learning_rate=5e-6,
            beta=0.2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            num_train_epochs=2,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 0.5],
            max_length=512,
            report_to=["tensorboard"],
            use_cpu=True,
            eval_strategy="epoch",
        )
        adapter = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
        found = library.from_trl(args, adapter)
        expected = {
            "out": tmp_path / "out",
            "learning_rate": [5e-6],
            "beta": [0.2],
            "batch_size": 8,
            "epochs": 2,
            "loss": "sigmoid",
            "sft_weight": 0.5,
            "max_length": 512,
            "seed": 42,
            "track": ["tensorboard"],
            "method": "lora",
            "lora_rank": 8,
            "lora_alpha": 32,
            "lora_targets": ["q_proj", "v_proj"],
        }
        assert {name: found[name] for name in expected} == expected
        assert "every trial is evaluated after every epoch" in found.told["eval_strategy"][1]
        assert "pairs per optimizer step" in found.told["per_device_train_batch_size"][1]
        assert "sft_weight: 0.5" in str(found)

    def test_an_8_bit_optimizer_is_taken_over_for_all_weights(self):
        assert library.from_trl({"optim": "paged_adamw_8bit"})["optimizer"] == "adamw-8bit"
        assert library.from_trl({"optim": "adamw_bnb_8bit"}, {"r": 4})["optimizer"] == "adamw"
        assert "optimizer" not in library.from_trl({})

    def test_trls_own_defaults_are_taken_over(self):
        ours = library.from_trl({})
        trls = library.from_trl(DPOConfig(output_dir="x", use_cpu=True))
        different = {name for name in trls if ours.get(name) != trls[name]}
        assert different == {"out", "optimizer"}  # the latter is named, and is the default
        assert trls["optimizer"] == "adamw"
        assert ours["method"] == "full"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("max_steps", 100),
            ("f_divergence_type", "js_divergence"),
            ("use_weighting", True),
            ("ld_alpha", 0.5),
            ("sync_ref_model", True),
            ("weight_decay", 0.1),
            ("lr_scheduler_type", "cosine"),
            ("warmup_steps", 10),
            ("loss_type", ["aot"]),
            ("num_train_epochs", 1.5),
            ("fp16", True),
            ("optim", "adafactor"),
            ("report_to", ["comet_ml"]),
        ],
    )
    def test_what_would_train_something_else_is_refused_by_name(self, field: str, value):
        with pytest.raises(library.BadInput, match=f"^{field}"):
            library.from_trl({field: value})

    def test_adapters_that_cannot_be_trained_are_refused(self):
        for adapter in ({"use_dora": True}, {"bias": "all"}, {"target_modules": ".*proj"}):
            with pytest.raises(library.BadInput, match="^peft_config"):
                library.from_trl({}, adapter)

    def test_every_field_that_names_trl_exists_there(self):
        from pairtune.trl_settings import _DEFAULTS, _NOT_NEEDED, _UNSUPPORTED

        there = DPOConfig.__dataclass_fields__.keys() | TrainingArguments.__dataclass_fields__.keys()
        assert {*_DEFAULTS, *_NOT_NEEDED, *_UNSUPPORTED} - there <= {"warmup_ratio"}  # of earlier versions
        config = DPOConfig(output_dir="x", use_cpu=True)
        for name, values in _UNSUPPORTED.items():
            if hasattr(config, name):
                assert getattr(config, name) in values or str(getattr(config, name)) in values
        for name, value in _DEFAULTS.items():
            assert getattr(config, name) == value

    def test_a_script_of_trl_trains_here(self, tiny_model: Path, tmp_path: Path):
        args = DPOConfig(output_dir=str(tmp_path / "run"), learning_rate=3e-3, num_train_epochs=1, use_cpu=True)
        settings = library.from_trl(args, LoraConfig(r=4))
        result = library.tune(rows(range(20)), **settings, model=str(tiny_model), samples=0, dtype="float32")
        config = result.run.settings
        assert (config.batch_size, config.lora_rank, config.learning_rate) == (8, 4, [3e-3])
        assert result.path == tmp_path / "run"


def test_in_a_notebook_progress_is_lines(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, live in (("json", True), ("ipykernel", False)):
        out = Terminal()
        monkeypatch.setattr(sys, "stderr", out)
        monkeypatch.setitem(sys.modules, name, sys.modules["json"])
        console = screen(stderr=True)
        with console.status("working"):
            console.print("a line")
        assert console.is_terminal is live
        assert (out.getvalue() == "a line\n") is not live
        assert not console.is_jupyter
