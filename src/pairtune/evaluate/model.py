"""`pairtune eval`: any model judged on any pairs, also one that was not tuned here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import SafetensorError

from pairtune.config import OnBadRow, TrialConfig
from pairtune.data.convert import tokenize_source
from pairtune.data.reading import Reading
from pairtune.data.table import PairTable
from pairtune.engine.evaluation import evaluate_weights
from pairtune.engine.kernels import Kernels
from pairtune.engine.records import (
    describe_examples,
    mean_metrics,
    metric_intervals,
    read_groups,
    read_records,
    write_records,
)
from pairtune.errors import BadInput, one_line
from pairtune.evaluate.answers import summarise
from pairtune.evaluate.generations import Speakers, held_out_prompts
from pairtune.evaluate.judges import EndpointJudge
from pairtune.evaluate.winrate import Judge, win_rate
from pairtune.models.load import LoadedBase, blank_model, open_base, open_base_of
from pairtune.models.resolve import base_of_adapter, find_adapter, resolve_model
from pairtune.runs import RunFolder

# In what a foreign adapter must be like ours, so that the engine's kernels can run it.
_PLAIN_LORA: dict[str, Any] = {
    "layers_to_transform": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
}

TUNED = "tuned"


@dataclass(frozen=True)
class Candidate:
    """A model to be judged, and the base that it is compared with.

    Attributes:
        name: what the person typed.
        trial: the beta and the adapter's shape; what else it says has no part in an evaluation.
        weights: the folder of the weights.
        base: the base.
        kernels: how the run that made it computed products; None: not known.
    """

    name: str
    trial: TrialConfig
    weights: Path
    base: LoadedBase
    kernels: dict[str, Any] | None = None


def open_candidate(target: str, base: str | None, beta: float, dtype: str) -> Candidate:
    """Find what `pairtune eval TARGET` names: a finished run, an adapter (folder or Hub id), or a model with `--base`.

    Raises:
        BadInput: it is none of these, or cannot be had.
    """
    folder = Path(target)
    if (folder / "config.yaml").is_file():
        return _of_run(RunFolder.finished(folder), dtype)
    if adapter := find_adapter(target):
        return _of_adapter(adapter, base, beta, dtype)
    if base is None:
        raise BadInput(
            f"--base: is needed with {target}, which is neither a run nor an adapter: what to compare it with"
        )
    source = resolve_model(target, "MODEL")
    trial = TrialConfig(learning_rate=1.0, beta=beta, method="full")
    return Candidate(target, trial, source.folder, open_base(base, dtype))


def _of_run(run: RunFolder, dtype: str) -> Candidate:
    """In the types that the run was made in; float32, where it is asked for, is for the evaluation alone."""
    config = run.read_json(run.trial(run.read_json(run.selection)["winner"]).record)["config"]
    if dtype == "bfloat16" and run.choices().get("dtype") == "float32":
        raise BadInput(f"--dtype bfloat16: {run.root} was trained in float32; leave the flag away")
    if dtype == "float32":
        config = config | {"eval_dtype": dtype}
    return Candidate(str(run.root), TrialConfig(**config), run.best, open_base_of(run), run.choices().get("kernels"))


def _of_adapter(folder: Path, base: str | None, beta: float, dtype: str) -> Candidate:
    try:
        settings: Any = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{folder}: the adapter's settings cannot be read ({one_line(error)})") from error
    beyond = [name for name, plain in _PLAIN_LORA.items() if (getattr(settings, name, plain) or plain) != plain]
    if str(settings.peft_type) not in ("LORA", "PeftType.LORA") or beyond:
        what = ", ".join(beyond) or settings.peft_type
        raise BadInput(
            f"{folder}: is no plain LoRA adapter ({what}); merge it into its base and give that, with --base"
        )
    targets = settings.target_modules
    if not targets or (isinstance(targets, str) and targets != "all-linear"):
        raise BadInput(f"{folder}: names its layers by {targets!r}; merge it into its base and give that, with --base")
    base = base or base_of_adapter(folder)
    trial = TrialConfig(
        learning_rate=1.0,
        beta=beta,
        lora_rank=settings.r,
        lora_alpha=settings.lora_alpha,
        rslora=settings.use_rslora,
        lora_targets=None if isinstance(targets, str) else tuple(sorted(targets)),
    )
    return Candidate(str(folder), trial, folder, open_base(base, dtype))


def read_pairs(
    candidate: Candidate, reading: Reading, on_bad_row: OnBadRow, folder: Path
) -> tuple[PairTable, dict[str, Any]]:
    """All pairs of a source, tokenized for the candidate, and the account of its rows.

    Raises:
        BadInput: a row cannot be used, or none is left.
    """
    path = folder / "pairs.arrow"
    count = tokenize_source(reading, candidate.base.tokenizer, candidate.trial.max_length, on_bad_row, path)
    if not count.kept:
        raise BadInput(f"{count.source}: no pair is left ({dict(count.dropped)})")
    return PairTable.open(path), count.as_dict()


def evaluate_pairs(
    candidate: Candidate, pairs: PairTable, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """What the candidate prefers, pair by pair, against its base.

    Returns:
        `pairs`, `metrics` and `intervals` under TRL's names, and `examples` (see `describe_examples`).
    """
    with tempfile.TemporaryDirectory(prefix="pairtune-") as scratch:
        reference = Path(scratch) / "reference.safetensors"
        try:
            kernels = Kernels(blank_model(candidate.base.source), candidate.base.device, candidate.kernels)
            records = evaluate_weights(
                candidate.trial, candidate.weights, candidate.base, pairs, reference, kernels, progress
            )
        except (ValueError, FileNotFoundError, SafetensorError) as error:
            raise BadInput(f"{candidate.weights}: the weights do not fit the base ({one_line(error)})") from error
        file = Path(scratch) / "records.parquet"
        write_records(file, pairs, records)
        return {
            "pairs": len(pairs),
            "metrics": mean_metrics(records),
            "intervals": metric_intervals(read_records(file), read_groups(file)),
            "examples": describe_examples(file),
        }


@dataclass
class Answered:
    """Held-out prompts with the answers of candidate and base."""

    prompts: list[Any]
    ours: list[Any]
    base: list[Any]

    def judged(self, judge: Judge, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """The content of a report: what was counted, and who wins how often by the judge."""
        asked = [str(turns[-1]["content"]) for turns in self.prompts]
        scores = judge.judge(self.prompts, self.ours, self.base, progress)
        return {
            "prompts": len(self.prompts),
            "base": summarise(asked, self.base),
            "tuned": summarise(asked, self.ours),
            "judge": judge.name,
            "win_rate": win_rate(scores, self.ours, self.base),
        }

    def cost(self, judge: Judge) -> dict[str, int] | None:
        """What an endpoint will be asked; None for judges on this machine."""
        return judge.estimate(self.prompts, self.ours, self.base) if isinstance(judge, EndpointJudge) else None


def answer_prompts(
    candidate: Candidate, pairs: PairTable, count: int, seed: int, progress: Callable[[str, int], None]
) -> Answered:
    """Let candidate and base answer the first different prompts of the pairs."""
    prompts = held_out_prompts(pairs, count)
    speakers = Speakers(candidate.base, {TUNED: candidate.weights})
    base, ours = (
        speakers.answer(name, prompts, seed, lambda done, name=name: progress(name, done))  # type: ignore[misc]
        for name in ("base", TUNED)
    )
    return Answered(prompts, ours, base)
