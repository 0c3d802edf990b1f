"""Results as Python objects: they show themselves as tables and charts in a notebook, and as text elsewhere."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from pairtune.errors import BadInput, plural
from pairtune.files import write_atomic
from pairtune.screen import harmless

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from pairtune.data.inspection import Inspection
    from pairtune.report.charts import Chart
    from pairtune.report.report_data import ReportData
    from pairtune.run.folder import Run
    from pairtune.run.records import AuditRecord, ComparedModels, EvaluationReport, Selection, SourceAccount

_WIDTH = 140  # characters
_FIRST = 5  # rows of pairs that are shown
_PARTS = ("prompt", "chosen", "rejected", "completion", "label")
_CELL = 300  # characters of a text that are shown
_PRE = '<pre style="white-space:pre;overflow-x:auto;line-height:1.3;font-family:monospace">{code}</pre>'


class Shown(ABC):
    """What `print` and a notebook show of a result: the same as the command line prints."""

    @abstractmethod
    def rendered(self) -> RenderableType:
        """The result for rich."""

    def __str__(self) -> str:
        console = _console()
        console.print(self.rendered(), highlight=False)
        return harmless(console.export_text().rstrip())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        console = _console()
        console.print(self.rendered(), highlight=False)
        return harmless(console.export_html(inline_styles=True, code_format=_PRE))


def _console() -> Console:
    from rich.console import Console

    return Console(record=True, file=io.StringIO(), width=_WIDTH, force_jupyter=False, markup=False)


class Pairs(Shown, Sequence[dict[str, Any]]):
    """Preference pairs, or single answers with a label, as rows of TRL's conversational format.

    A row has `prompt`, `chosen` and `rejected`, each a list of messages with `role` and `content`, or for single
    answers `prompt`, `completion` and `label`; and `origin`, the source and row that it was made of.

    Examples:
        >>> pairs = pairtune.load_pairs("pairs.csv")  # doctest: +SKIP
        >>> short = pairs.where(lambda row: len(row["prompt"][-1]["content"]) < 500)  # doctest: +SKIP
        >>> pairtune.tune(short)  # doctest: +SKIP

    Attributes:
        rows: the rows.
        account: how many rows the source had, and why which were dropped; None after `where`.
        better: which answer was taken for the better one, and why.
    """

    def __init__(self, rows: list[dict[str, Any]], account: SourceAccount | None, better: str) -> None:
        self.rows, self.account, self.better = rows, account, better

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Pairs:
        return Pairs(self.rows[index], None, self.better) if isinstance(index, slice) else self.rows[index]

    def where(self, keep: Callable[[dict[str, Any]], bool]) -> Pairs:
        """The pairs for which `keep` is true."""
        return Pairs([row for row in self.rows if keep(row)], None, self.better)

    def save(self, path: str | Path) -> Path:
        """Write the rows to a `.jsonl` file, atomically, which `--data` and other trainers read.

        Raises:
            BadInput: a row holds something that JSON has no form for.
        """
        path = Path(path)
        write_atomic(path, json_lines(self.rows, str(path)))
        return path

    def rendered(self) -> RenderableType:
        """What was read, and the first rows."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        said = plural(len(self.rows), "row")
        if self.account:
            dropped = "".join(f", {rows:,} dropped: {reason}" for reason, rows in self.account.dropped.items())
            said = f"{said} kept of {self.account.rows_in:,} in {self.account.source}{dropped}"
        parts = [name for name in _PARTS if any(name in row for row in self)]
        table = Table(show_lines=True)
        for name in parts:
            table.add_column(name, overflow="fold", ratio=1)
        for row in self.rows[:_FIRST]:
            table.add_row(*(Text(_shortened(row.get(name))) for name in parts))
        return Group(Text(said, style="bold"), Text(f"the better answer: {self.better}", style="dim"), table)


def _shortened(value: Any) -> str:
    if isinstance(value, list):
        value = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    text = str(value)
    return text if len(text) <= _CELL else f"{text[:_CELL]}…"


def json_lines(rows: Sequence[Mapping[str, Any]], where: str) -> str:
    """Rows as JSON lines.

    Raises:
        BadInput: a row is no mapping, or holds something that JSON has no form for.
    """
    lines = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise BadInput(f"{where}: row {number} should be a mapping of columns, not {type(row).__name__}")
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise BadInput(f"{where}: row {number} cannot be written as JSON ({error})") from error
    return "".join(lines)


class DataReport(Shown):
    """What a source of pairs contains and what is wrong with it; `record` has the numbers."""

    def __init__(self, record: Inspection) -> None:
        self.record = record

    @property
    def verdict(self) -> str:
        """`ok`, `ok with warnings`, `not confirmed` or `not usable`."""
        return self.record.verdict

    def rendered(self) -> RenderableType:
        """As `pairtune data inspect` prints it."""
        from pairtune.report.render_inspection import render_inspection

        return render_inspection(self.record)


class Result(Shown):
    """A finished run.

    Examples:
        >>> result = pairtune.open_run("runs/demo")  # doctest: +SKIP
        >>> result.verdict  # doctest: +SKIP
        'no two trials can be told apart'
        >>> pandas.DataFrame(result.evaluations)  # doctest: +SKIP

    Attributes:
        run: the run folder.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.run.root

    @property
    def best(self) -> Path:
        """The folder of the selected weights: a LoRA adapter for PEFT, or with method full a whole model."""
        best: Path = self.run.paths.best
        return best

    @property
    def winner(self) -> str:
        """The name of the selected trial."""
        return self._selection.winner

    @property
    def verdict(self) -> str:
        """Whether the validation pairs tell the trials apart, in words."""
        return self._selection.verdict

    @property
    def warnings(self) -> list[str]:
        """What one should know before believing the selection."""
        return list(self._selection.warnings)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """One row per trial: its settings and status, and the metrics of its best epoch with 95 % intervals.

        Metrics have TRL's names (`eval_loss`, `eval_rewards/accuracies`, `eval_rewards/margins`, …), margins and
        log-probs are in nats; `NAME_low` and `NAME_high` are the ends of the interval over conversations.
        """
        ranked = {each.name: each for each in self._selection.ranking}
        rows = []
        for trial in self._read.sweep.trials:
            row: dict[str, Any] = trial.model_dump(mode="json", exclude={"metrics"})
            if found := ranked.get(trial.name):
                row |= found.metrics.model_dump(mode="json", by_alias=True)
                for name, (low, high) in found.intervals.items():
                    row |= {f"{name}_low": low, f"{name}_high": high}
            rows.append(row | {"winner": trial.name == self.winner})
        return rows

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One row per evaluation, in order: the trial, its epoch and step, and the metrics with TRL's names."""
        return [
            {"trial": name, **evaluation.model_dump(mode="json", by_alias=True)}
            for name, record in self._read.records.items()
            for evaluation in record.epochs
        ]

    @property
    def test(self) -> dict[str, Any] | None:
        """The winner's metrics on test pairs that had no part in training and selection; None if there were none."""
        from pairtune.run.records import dump

        return dump(self._read.test) if self._read.test else None

    @property
    def answers(self) -> list[dict[str, str]]:
        """Answers of the base model and of the winner to held-out prompts."""
        return [
            {"prompt": each.prompt, "before": each.base.text, "after": each.tuned.text} for each in self._read.answers
        ]

    @property
    def charts(self) -> dict[str, str]:
        """The curves of all trials, each an SVG file's text, by name: `loss`, `accuracy`, `margin` and others."""
        from pairtune.report.charts import draw, standalone

        return {name: standalone(draw(chart)) for name, chart in self._curves.items()}

    def audit(self) -> Audit:
        """What the audit found in the run's own numbers."""
        from pairtune.run.records import AuditRecord

        betas = {name: record.trial.beta for name, record in self._read.records.items()}
        return Audit(self.run.need(AuditRecord), betas)

    def load(self) -> tuple[Any, Any]:
        """The tuned model and its tokenizer, in the dtype and on the device that the run was made with.

        Returns:
            A `PeftModel`, or with method full a `PreTrainedModel`; and the tokenizer.
        """
        from pairtune.models.load import load_tokenizer, load_tuned
        from pairtune.models.start import open_base_of

        return load_tuned(self.best, open_base_of(self.run)), load_tokenizer(self.best)

    def rendered(self) -> RenderableType:
        """As `pairtune tune` prints it."""
        from pairtune.report.render_run import render_run

        return render_run(self.run)

    def _repr_html_(self) -> str:
        from pairtune.report.charts import SERIES as COLOURS

        trials = "".join(
            f'<span style="margin-right:1.5em"><span class="swatch s{number % COLOURS}"></span> {escape(trial.label)}'
            f"{' (winner, thick)' if trial.name == self.winner else ''}</span>"
            for number, trial in enumerate(self._read.trials)
        )
        drawn = "".join(
            f'<figure style="flex:1 1 20em;max-width:30em;margin:.5em 0"><figcaption>{escape(self._curves[name].title)}'
            f"</figcaption>{svg}</figure>"
            for name, svg in self.charts.items()
        )
        return f'{super()._repr_html_()}<p>{trials}</p><div style="display:flex;flex-wrap:wrap;gap:1em">{drawn}</div>'

    @property
    def _curves(self) -> dict[str, Chart]:
        from pairtune.report.series import charts

        return charts(self._read.trials, self.winner)

    @property
    def _read(self) -> ReportData:
        from pairtune.report.report_data import ReportData

        return ReportData(self.run)

    @property
    def _selection(self) -> Selection:
        return self._read.selection


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """A model against its base on pairs; `record` has metrics, intervals and judged answers."""

    record: EvaluationReport

    def rendered(self) -> RenderableType:
        """As `pairtune eval` prints it."""
        from pairtune.report.render_evaluation import render_evaluation

        return render_evaluation(self.record)


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Two models on the same pairs; `record.outcome` is `better`, `worse` or `cannot be told`, of the second."""

    record: ComparedModels

    def rendered(self) -> RenderableType:
        """As `pairtune compare` prints it."""
        from pairtune.report.render_evaluation import render_comparison

        return render_comparison(self.record)


@dataclass(frozen=True, repr=False)
class Audit(Shown):
    """What is wrong with a run, from its own numbers.

    Attributes:
        record: the findings, the rules that passed, and those that could not be checked.
        betas: the trials' betas, as far as they are known.
    """

    record: AuditRecord
    betas: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The worst level found: `error`, `warning`, `note`, or `clean`."""
        return self.record.verdict

    @property
    def findings(self) -> list[dict[str, Any]]:
        """One row per finding: rule, level, trial, what was found, and what to do."""
        return [finding.model_dump(mode="json") for finding in self.record.findings]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.findings)

    def rendered(self) -> RenderableType:
        """As `pairtune audit` prints it."""
        from pairtune.report.render_audit import render_audit

        return render_audit(self.record)
