"""The commands as functions, for notebooks and scripts; the command line calls the same.

Each returns an object that shows itself as the command would (`pairtune.shown`). What a person got wrong raises
`BadInput`, whose text is the line that the command prints.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtune.errors import BadInput
from pairtune.files import write_atomic
from pairtune.open_data import check_choice, open_reader, probe, reading_of, with_votes
from pairtune.screen import screen
from pairtune.shown import Audit, Comparison, DataReport, Evaluation, Pairs, Result, json_lines

if TYPE_CHECKING:
    from rich.console import Console

    from pairtune.config import OnBadRow, Pairing, Wanted
    from pairtune.resolve_config import Resolved

# What can be trained or evaluated on: what `--data` takes, rows, or a table of pandas or datasets.
Source = str | Path | Pairs | Iterable[Mapping[str, Any]]
# Called with the calls and tokens that a judge behind an endpoint would take, and its name; raises to refuse.
Agree = Callable[[dict[str, int], str], None]

_SOURCE = {"source", "weight", "columns"}  # what a source may have besides its name; see `config.SourceConfig`
_ROWS = "rows"  # what rows that are in no file are called in messages


def load_pairs(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    pairs: Pairing = "best-worst",
    min_gap: float = 0.0,
    single: bool = False,
    limit: int | None = None,
    on_bad_row: OnBadRow = "stop",
    accept_columns: bool = False,
) -> Pairs:
    """Read preference pairs from any of the formats in docs/formats.md.

    Args:
        source: as for `--data`: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder, a Hub id, `bundled:concise`,
            or `votes`.
        columns: which column holds which part, if the columns do not identify the format: `{"chosen": "good"}`.
        pairs: which pairs a list of rated answers gives.
        min_gap: leave out pairs whose scores differ by less.
        single: read single answers with a label instead, of which a pair gives two.
        limit: read at most this many rows.
        on_bad_row: stop at a faulty row, or skip and count such rows.
        accept_columns: confirms that the named columns say which answer is better.

    Raises:
        BadInput: the source cannot be read, is in no known format, or has a faulty row.
    """
    from pairtune.data.convert import conversational_rows
    from pairtune.data.preference import RowCount

    wanted: Wanted = "single answers" if single else "pairs"
    reading = reading_of(columns, pairs, min_gap, accept_columns, wanted)
    reader = open_reader(str(source), reading, limit)
    count = RowCount(reader.source.name, "all")
    rows = list(conversational_rows(reader, count, on_bad_row))
    return Pairs(rows, count.account(), reader.better)


def inspect(
    source: str | Path,
    *,
    model: str = "smollm2-135m",
    max_length: int = 1024,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    pairs: Pairing = "best-worst",
    min_gap: float = 0.0,
    accept_columns: bool = False,
) -> DataReport:
    """Report what a source contains, what is wrong with it, and what a model would see (`pairtune data inspect`).

    Args:
        source: as for `load_pairs`.
        model: the model whose tokenizer and chat template are used.
        max_length: of a pair, in tokens.
        limit: read at most this many rows.
        columns: which column holds which part, if the columns do not identify the format: `{"chosen": "good"}`.
        pairs: which pairs a list of rated answers gives.
        min_gap: leave out pairs whose scores differ by less.
        accept_columns: confirms that the named columns say which answer is better.

    Raises:
        BadInput: the source or the model cannot be read.
    """
    reader = open_reader(str(source), reading_of(columns, pairs, min_gap, accept_columns, "either"), limit)
    console = screen(stderr=True)
    with loading(console):
        from pairtune.data.inspect_source import inspect_source
        from pairtune.models.load import load_tokenizer
        from pairtune.models.resolve import resolve_model

    with console.status("reading") as status:
        tokenizer = load_tokenizer(resolve_model(model))
        found = inspect_source(reader, tokenizer, max_length, lambda rows: status.update(f"reading: {rows:,} rows"))
    return DataReport(found)


def tune(data: Source | list[str] | None = None, *, config: str | Path | None = None, **settings: Any) -> Result:
    """Train every trial of a grid from pristine weights and keep the best epoch of the best trial (`pairtune tune`).

    Examples:
        >>> pairtune.tune("pairs.jsonl", learning_rate=[3e-5, 1e-5], beta=[0.1, 0.2], out="runs/grid")  # doctest: +SKIP

    Args:
        data: as for `load_pairs`; several sources to mix; or rows: `Pairs`, a list of dictionaries in any known format,
            a `datasets.Dataset`, a pandas table. Rows are kept in a file beside the run, so that it can be resumed.
        config: a YAML file with settings, which the arguments override.
        settings: any setting of docs/settings.md by its name; a list of values makes one trial of each.

    Returns:
        The finished run.

    Raises:
        BadInput: an input cannot be used; nothing was trained.
        RunFailed: a guard stopped the run; its folder is kept.
        Interrupted: the run was asked to stop; `resume` goes on with it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("tune: several processes train through the command: accelerate launch -m pairtune tune ...")
    resolved = settings_of(Path(config) if config else None, {**settings, "data": data})
    console = screen(stderr=True)
    with loading(console):
        from pairtune.pipeline import tune as train

    run = train(resolved, console)
    assert run is not None  # noqa: S101 - there is one process
    return Result(run)


def resume(run: str | Path) -> Result:
    """Go on with an interrupted run (`pairtune resume`); a finished one is returned as it is.

    Raises:
        BadInput: the folder is no run, or an input has changed.
        RunFailed: a guard stopped the run; its folder is kept.
        Interrupted: the run was asked to stop again.
    """
    console = screen(stderr=True)
    with loading(console):
        from pairtune.pipeline import resume as go_on

    found = go_on(Path(run), console)
    assert found is not None  # noqa: S101 - there is one process
    return Result(found)


def open_run(run: str | Path) -> Result:
    """A finished run.

    Raises:
        BadInput: there is none in this folder.
    """
    from pairtune.run.folder import Run

    return Result(Run.finished(Path(run)))


def evaluate(
    target: str | Path | Result,
    data: str | Path,
    *,
    base: str | None = None,
    beta: float = 0.1,
    judge: str = "rule",
    judge_model: str | None = None,
    samples: int = 32,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    pairs: Pairing = "best-worst",
    min_gap: float = 0.0,
    accept_columns: bool = False,
    on_bad_row: OnBadRow = "stop",
    dtype: str = "auto",
    seed: int = 0,
    agree: Agree = lambda cost, judge: None,
) -> Evaluation:
    """Evaluate a model on pairs (`pairtune eval`): what it prefers, what it answers, how often it beats its base.

    Args:
        target: a finished run, `RUN/TRIAL`, a LoRA adapter, or with `base` any model.
        data: pairs, as for `load_pairs`.
        base: the model to compare with; a run and an adapter name their own.
        beta: for losses and rewards (nats), unless a run sets it.
        judge: `rule` (counts faults of form), `concise`, a reward model, or an OpenAI-style endpoint (`http...`).
        judge_model: the judge's name at the endpoint.
        samples: prompts that both models answer, for the judge; 0 for none.
        limit: read at most this many rows.
        columns: which column holds which part, if the columns do not identify the format: `{"chosen": "good"}`.
        pairs: which pairs a list of rated answers gives.
        min_gap: leave out pairs whose scores differ by less.
        accept_columns: confirms that the named columns say which answer is better.
        on_bad_row: stop at a faulty row, or skip and count such rows.
        dtype: `auto`, `float32` or `bfloat16`.
        seed: of the answers.
        agree: called with the cost before an endpoint is asked; raises to refuse.

    Raises:
        BadInput: the target or the data cannot be used.
    """
    _check(beta, on_bad_row, dtype)
    reading = reading_of(columns, pairs, min_gap, accept_columns, "either")
    open_reader(str(data), reading, limit, "--data")  # before anything slow
    console = screen(stderr=True)
    with loading(console):
        from pairtune.config import UNPAIRED
        from pairtune.evaluation.judges import open_judge
        from pairtune.evaluation.model import answer_prompts, evaluate_pairs, open_candidate, read_pairs

    judging = open_judge(judge, judge_model)
    candidate = open_candidate(_name(target), base, beta, dtype)
    wanted: Wanted = "single answers" if candidate.saved.objective.loss in UNPAIRED else "pairs"
    reader = open_reader(str(data), reading_of(columns, pairs, min_gap, accept_columns, wanted), limit, "--data")
    with tempfile.TemporaryDirectory(prefix="pairtune-") as folder:
        with console.status("reading pairs") as status:
            read, rows = read_pairs(candidate, reader, on_bad_row, Path(folder))
            status.update("evaluating")
            total = len(read)
            found = evaluate_pairs(candidate, read, rows, lambda done: status.update(f"evaluating: {done:,}/{total:,}"))
            if samples:
                answered = answer_prompts(
                    candidate, read, samples, seed, lambda done: status.update(f"answering: {done}/{2 * samples}")
                )
        if samples:
            if cost := answered.cost(judging):
                agree(cost, judging.name)
            with console.status("judging") as status:
                judged = answered.judged(judging, lambda done: status.update(f"judging: {done}"))
            found = found.model_copy(update={"answers": judged})
    return Evaluation(found)


def compare(
    one: str | Path | Result,
    other: str | Path | Result,
    data: str | Path,
    *,
    beta: float = 0.1,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    pairs: Pairing = "best-worst",
    min_gap: float = 0.0,
    accept_columns: bool = False,
    on_bad_row: OnBadRow = "stop",
    dtype: str = "auto",
) -> Comparison:
    """Tell whether `other` is better than `one` on pairs that neither was trained on (`pairtune compare`).

    Both are measured against the base model that they go back to, and the difference of DPO's loss is tested pair by
    pair.

    Args:
        one: a run, `RUN/TRIAL`, an adapter, or the base model.
        other: what it is compared with.
        data: pairs, as for `load_pairs`.
        beta: of the loss that decides.
        limit: read at most this many rows.
        columns: which column holds which part, if the columns do not identify the format: `{"chosen": "good"}`.
        pairs: which pairs a list of rated answers gives.
        min_gap: leave out pairs whose scores differ by less.
        accept_columns: confirms that the named columns say which answer is better.
        on_bad_row: stop at a faulty row, or skip and count such rows.
        dtype: `auto`, `float32` or `bfloat16`.

    Raises:
        BadInput: a model or the data cannot be used, or they go back to different base models.
        RunFailed: an evaluation was stopped by a guard.
    """
    _check(beta, on_bad_row, dtype)
    reader = open_reader(str(data), reading_of(columns, pairs, min_gap, accept_columns, "pairs"), limit, "--data")
    console = screen(stderr=True)
    with loading(console):
        from pairtune.evaluation.compare import compare_models, open_both

    with console.status("reading pairs") as status, tempfile.TemporaryDirectory(prefix="pairtune-") as folder:
        found = compare_models(
            *open_both(_name(one), _name(other), beta, dtype),
            reader,
            on_bad_row,
            Path(folder),
            lambda name, done, total: status.update(f"evaluating {name}: {done:,}/{total:,}"),
        )
    return Comparison(found)


def audit(
    path: str | Path | Result,
    *,
    eval_rows: int | None = None,
    batch_size: int | None = None,
    beta: float | list[str] | None = None,
    loss: str | None = None,
) -> Audit:
    """Find what is wrong with a run from its own numbers (`pairtune audit`).

    Args:
        path: a run folder, TRL's `trainer_state.json`, a CSV, or a run of W&B.
        eval_rows: number of validation rows, if the log does not state it.
        batch_size: evaluation batch size, if the log does not state it.
        beta: DPO's beta, if the log does not state it; for several trials `TRIAL=FLOAT` of each, or values in order.
        loss: TRL's name of the loss, if the log does not state it.

    Raises:
        BadInput: the file cannot be read, or has no rows of a training run.
    """
    from pairtune.evaluation.audit.check import audit as check
    from pairtune.evaluation.audit.logged_rows import with_options
    from pairtune.evaluation.audit.read import read_evidence

    betas = beta if beta is None or isinstance(beta, list) else [str(beta)]
    evidence = with_options(read_evidence(Path(_name(path))), eval_rows, batch_size, betas, loss)
    return Audit(check(evidence), {trial.name: trial.beta for trial in evidence.trials if trial.beta})


@contextmanager
def loading(console: Console) -> Iterator[None]:
    """Within this context, the screen shows that libraries are being imported, which takes seconds."""
    with console.status("loading PyTorch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # tqdm in notebooks; its bars are not used
        yield


def settings_of(file: Path | None, given: Mapping[str, Any]) -> Resolved:
    """The settings of a run, with votes frozen, rows kept in a file and the first rows of every source read.

    Raises:
        BadInput: a setting, a source or the folder cannot be used.
    """
    from pairtune.resolve_config import resolve
    from pairtune.run.folder import check_new

    flags = {name: value for name, value in given.items() if value is not None}
    rows = {name: flags.pop(name) for name in ("data", "eval_data", "test_data") if _is_rows(flags.get(name))}
    placeholder = {name: [_ROWS] for name in rows}
    resolved = resolve(file, {**_plain(flags), **placeholder})
    check_new(resolved.config.out)
    with ExitStack() as unless_used:
        for name, value in rows.items():
            path, new = _keep(value, name, resolved.config.out.parent)
            flags |= {name: [str(path)], "out": resolved.config.out}
            if new:
                unless_used.callback(path.unlink)
        resolved = with_votes(resolve(file, _plain(flags)) if rows else resolved)
        probe(resolved.config)
        unless_used.pop_all()  # bad input leaves nothing behind
    return resolved


def _plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with paths and runs as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return str(value.path) if isinstance(value, Result) else str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in flags.items()}


def _is_rows(value: Any) -> bool:
    """Whether a value is rows, and not the name of a source or several."""
    if value is None or isinstance(value, str | Path | Mapping):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(each, Mapping) and not each.keys() <= _SOURCE for each in value)
    return True


def _keep(rows: Any, name: str, folder: Path) -> tuple[Path, bool]:
    """A file with the rows, named by its content, so that a run can be resumed and repeated; and whether it is new."""
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a table of pandas
        rows = rows.to_dict(orient="records")
    text = json_lines(list(rows), name)
    path = folder / f"pairs-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    if path.is_file():
        return path, False
    write_atomic(path, text)
    return path, True


def _check(beta: float, on_bad_row: str, dtype: str) -> None:
    check_choice("--on-bad-row", on_bad_row, ("stop", "skip"))
    check_choice("--dtype", dtype, ("auto", "float32", "bfloat16"))
    if not 0 < beta < float("inf"):
        raise BadInput(f"--beta: must be greater than 0, not {beta:g}")


def _name(target: str | Path | Result) -> str:
    return str(target.path if isinstance(target, Result) else target)
