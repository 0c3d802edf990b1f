"""`pairtune data draft`: pairs without people. A model answers each prompt several times, and a judge ranks them.

With rounds this is DPO on the policy's own answers, batch by batch (Guo et al. 2024, "Direct Language Model Alignment
from Online AI Feedback"): each round drafts pairs with the model of the round before, and trains it further on them.
"""

from __future__ import annotations

import hashlib
import json
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console

from pairtune.conversation import Message
from pairtune.data.splits import prompt_key
from pairtune.errors import BadInput, RunFailed, plural
from pairtune.evaluation.winrate import Judge, win_rate
from pairtune.files import write_atomic, write_json
from pairtune.models.resolve import resolve_target
from pairtune.models.sampling import SamplingParams
from pairtune.pipeline import tune
from pairtune.report.phrases import duration
from pairtune.resolve_config import Resolved, resolve
from pairtune.run.folder import Run, check_new
from pairtune.run.records import Answer, WinRate
from pairtune.serve.catalogue import Catalogue, OpenedModel
from pairtune.serve.request import Failed, Finished, Limits, TextDelta
from pairtune.track.live_view import QUIET_SECONDS

Prompt = tuple[Message, ...]
Tell = Callable[[str], None]

_RUNNING = 32  # answers at once
_CONTEXT = 4096
# What the rounds train with, unless a settings file says otherwise: one trial, lightly, since the next round follows.
# The SFT term keeps later rounds at the chosen answers, where DPO alone goes on away from the rejected ones (Pang et
# al. 2024, "Iterative Reasoning Preference Optimization", section 2; LOG.md has rounds with and without it).
_TRAINING: dict[str, Any] = {"learning_rate": [1e-4], "beta": [0.1], "epochs": 2, "sft_weight": 1.0, "samples": 0}


@dataclass(frozen=True)
class Drafting:
    """How answers are sampled and ranked.

    Attributes:
        answers: number of answers to each prompt.
        judge: ranks them, two by two.
        params: sampling; each answer has a seed of its own.
    """

    answers: int
    judge: Judge
    params: SamplingParams


@dataclass
class Drafted:
    """Pairs, and what became of the prompts: `len(rows) + left_out.total()` prompts were answered."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def write(self, path: Path) -> None:
        """Write the pairs in TRL's conversational format, each with its provenance in `draft`."""
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a text file, one a line, or from JSON lines with `prompt`, a text or a list of messages.

    Raises:
        BadInput: the file cannot be read, a row has no prompt, or there are none.
    """
    where = f"--prompts {path}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{where}: cannot be read as text ({error})") from error
    found: dict[int, Prompt] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = _prompt(line, path.suffix, f"{where}:{number}")
            found.setdefault(prompt_key(prompt), prompt)
    if not found:
        raise BadInput(f"{where}: has no prompt")
    return list(found.values())


def _prompt(line: str, suffix: str, where: str) -> Prompt:
    if suffix not in (".jsonl", ".json"):
        return ({"role": "user", "content": line.strip()},)
    try:
        given = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{where}: should be a JSON object with a field prompt") from error
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    valid = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and isinstance(turn.get("role"), str)
        for turn in turns
    )
    if not valid or not turns or turns[-1]["role"] != "user":
        raise BadInput(f"{where}: prompt should be a text, or messages that end with the user's")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


class Drafter:
    """One model that answers prompts through the server's scheduler.

    Args:
        name: a run, a trial, an adapter or a model.
        tell: called with the progress.

    Raises:
        BadInput: the model cannot be loaded, or its family cannot be served.
    """

    def __init__(self, name: str, tell: Tell) -> None:
        self.name, self._tell = name, tell
        self._catalogue = Catalogue([name], None, Limits(_RUNNING, _RUNNING, _CONTEXT))
        models, target = self._catalogue.models(), resolve_target(name)
        named = f"{target.run.name}/{target.trial}" if target.run and target.trial else target.run and target.run.name
        # Of an adapter or a plain model there is nothing else than its base.
        self._model: OpenedModel = self._catalogue.open(models[named] if named else list(models.values())[-1])

    @property
    def fingerprint(self) -> str:
        """Fingerprints of the weights, the base's and the adapter's."""
        return self._model.fingerprint

    def close(self) -> None:
        """Free the model."""
        self._catalogue.close()

    def answer(self, prompts: Sequence[Prompt], params: SamplingParams, count: int) -> list[list[Answer]]:
        """`count` answers to each prompt, in order, [count][prompts]."""
        work = [(number, prompt, turn) for turn in range(count) for number, prompt in enumerate(prompts)]
        answers: dict[tuple[int, int], Answer] = {}
        waiting, events, started = iter(work), queue.SimpleQueue[Any](), time.monotonic()
        running: dict[tuple[int, int], list[str]] = {}
        while len(answers) < len(work):
            while len(running) < _RUNNING and (following := next(waiting, None)):
                number, prompt, turn = following
                running[turn, number] = []
                self._submit(
                    prompt, replace(params, seed=_seed(params.seed or 0, number, turn)), (turn, number), events
                )
            key, event = events.get()
            if isinstance(event, TextDelta):
                running[key].append(event.text)
            elif isinstance(event, Failed):
                raise RunFailed(f"{self.name}: an answer failed ({event.message})")
            elif isinstance(event, Finished):
                text = "".join(running.pop(key)).strip()
                answers[key] = Answer(text=text, tokens=event.tokens, ended=event.reason == "stop")
                left = (time.monotonic() - started) / len(answers) * (len(work) - len(answers))
                self._tell(f"{len(answers):,}/{len(work):,} answers, {duration(left)} left")
        return [[answers[turn, number] for number in range(len(prompts))] for turn in range(count)]

    def _submit(
        self, prompt: Prompt, params: SamplingParams, key: tuple[int, int], events: queue.SimpleQueue[Any]
    ) -> None:
        ids = self._model.encode(prompt)
        if len(ids) + params.max_tokens > self._model.context:
            raise BadInput(
                f"--prompts: a prompt has {len(ids):,} tokens; with --max-tokens {params.max_tokens} it exceeds the "
                f"{self._model.context:,} that {self.name} has room for"
            )
        self._model.scheduler.submit(self._model.request(ids, params, lambda event: events.put((key, event))))


def _seed(seed: int, number: int, turn: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {turn}".encode()).digest()[:4]) // 2


def draft_pairs(drafter: Drafter, prompts: Sequence[Prompt], how: Drafting) -> Drafted:
    """Answer all prompts and pair the best answer of each with the worst, by wins in a round robin."""
    answers = drafter.answer(prompts, how.params, how.answers)
    wins = [[0.0] * how.answers for _ in prompts]
    for one, other in combinations(range(how.answers), 2):
        scores = how.judge.judge(prompts, answers[one], answers[other], lambda done: None)
        for number, score in enumerate(scores):
            wins[number][one] += score
            wins[number][other] += 1 - score
    found = Drafted()
    for number, (prompt, won) in enumerate(zip(prompts, wins, strict=True)):
        best, worst = max(range(how.answers), key=won.__getitem__), min(range(how.answers), key=won.__getitem__)
        chosen, rejected = answers[best][number], answers[worst][number]
        if won[best] == won[worst]:
            found.left_out["all answers are equally good"] += 1
        elif not (chosen.text and rejected.text):
            found.left_out["an empty answer"] += 1
        else:
            found.rows.append(_row(prompt, chosen, rejected, (won[best], won[worst]), drafter, how))
    return found


def _row(
    prompt: Prompt, chosen: Answer, rejected: Answer, won: tuple[float, float], drafter: Drafter, how: Drafting
) -> dict[str, Any]:
    params = how.params
    return {
        "prompt": list(prompt),
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "draft": {
            "model": drafter.name,
            "fingerprint": drafter.fingerprint,
            "judge": how.judge.name,
            "answers": how.answers,
            "chosen_wins": won[0],
            "rejected_wins": won[1],
            "chosen_tokens": chosen.tokens,
            "rejected_tokens": rejected.tokens,
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "seed": params.seed,
        },
    }


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: 1 for the first.
        pairs: number of pairs drafted.
        left_out: prompts without a pair, by reason.
        run: the folder of its run.
        won: how its answers to held-out prompts fare against those of the model that the rounds began with.
    """

    number: int
    pairs: int
    left_out: dict[str, int]
    run: str
    won: WinRate

    def __str__(self) -> str:
        low, high = self.won.interval
        return (
            f"round {self.number}: wins {self.won.rate:.0%} ({low:.0%} to {high:.0%}) of "
            f"{plural(len(self.won.scores), 'held-out prompt')} against the beginning"
        )

    def record(self) -> dict[str, Any]:
        """The round as it is written to `rounds.json`."""
        return {**vars(self), "won": self.won.model_dump(mode="json", exclude={"scores"})}


def draft_rounds(
    model: str,
    prompts: Sequence[Prompt],
    how: Drafting,
    rounds: int,
    out: Path,
    settings: Path | None,
    console: Console,
    hold_out: float = 0.2,
) -> Iterator[Round]:
    """Draft and train in turns; each round starts from the model of the one before, and has prompts of its own.

    Some prompts, drawn by their hashes, are never trained on: there every round's answers are compared with those of
    the first model by the same judge, each prompt with the same seed. The others are dealt to the rounds in turn, so
    that each has its share of every part of the file. (Given the same prompts again and again, a model learns to answer
    these, and the rest less and less.)

    Args:
        model: what the rounds begin with.
        prompts: the prompts.
        how: how answers are sampled and ranked; each round has seeds of its own.
        rounds: how many.
        out: the new folder that gets `pairs-1.jsonl`, the run `round-1` and so on, and `rounds.json`.
        settings: a file with settings for the training; None for one light trial.
        console: receives the progress.
        hold_out: the share of the prompts that is not trained on.

    Raises:
        BadInput: the folder exists, there are too few prompts, a round drafts no pair, or the settings cannot be used.
    """
    check_new(out)
    held, used = _hold_out(prompts, hold_out)
    if not held or len(used) < rounds:
        told = f"{len(held)} of {plural(len(prompts), 'prompt')} are held out (--hold-out {hold_out:g})"
        raise BadInput(f"--prompts: {told}, which is too few, or leaves less than one for each round; give more")
    before = _answers(model, held, how, "before", console)
    found: list[Round] = []
    for number in range(1, rounds + 1):
        pairs, left_out = _draft_round(model, used[number - 1 :: rounds], how, number, out, console)
        resolved = _resolved(model, pairs, out / f"round-{number}", settings)
        run: Run | None = tune(resolved, console)
        assert run is not None  # noqa: S101 - there is one process
        model = str(run.root)
        after = _answers(model, held, how, f"after round {number}", console)
        won = win_rate(how.judge.judge(held, after, before, lambda done: None), after, before)
        found.append(Round(number, left_out.pop("pairs"), left_out, model, won))
        write_json(out / "rounds.json", [each.record() for each in found])
        yield found[-1]


def _hold_out(prompts: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that are held out, and the others."""
    apart = [prompt_key(prompt) < share * 2**64 for prompt in prompts]
    held = [prompt for prompt, kept in zip(prompts, apart, strict=True) if kept]
    return held, [prompt for prompt, kept in zip(prompts, apart, strict=True) if not kept]


def judge_calls(prompts: Sequence[Prompt], answers: int, rounds: int, hold_out: float) -> int:
    """How often a judge is asked at most: for each two answers to a prompt in both orders."""
    held, used = _hold_out(prompts, hold_out) if rounds else ([], prompts)
    return len(used) * answers * (answers - 1) + len(held) * 2 * rounds


def _draft_round(
    model: str, prompts: Sequence[Prompt], how: Drafting, number: int, out: Path, console: Console
) -> tuple[Path, dict[str, int]]:
    path = out / f"pairs-{number}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    seeded = replace(how, params=replace(how.params, seed=(how.params.seed or 0) + number))
    drafted = draft_file(model, prompts, seeded, path, console)
    console.print(f"round {number}: {plural(len(drafted.rows), 'pair')} drafted", highlight=False)
    return path, {"pairs": len(drafted.rows), **drafted.left_out}


def draft_file(model: str, prompts: Sequence[Prompt], how: Drafting, path: Path, console: Console) -> Drafted:
    """Draft pairs with a model, and write them.

    Raises:
        BadInput: the model cannot be used, or no prompt gave a pair.
    """
    with _telling(console, "drafting") as tell:
        drafter = Drafter(model, tell)
        try:
            drafted = draft_pairs(drafter, prompts, how)
        finally:
            drafter.close()
    if not drafted.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in drafted.left_out.items())
        raise BadInput(
            f"--prompts: no prompt gave a pair ({reasons}); ask for more --answers, or choose another --judge"
        )
    drafted.write(path)
    return drafted


def _answers(model: str, prompts: Sequence[Prompt], how: Drafting, when: str, console: Console) -> list[Answer]:
    with _telling(console, f"answering held-out prompts {when}") as tell:
        drafter = Drafter(model, tell)
        try:
            return drafter.answer(prompts, how.params, 1)[0]
        finally:
            drafter.close()


@contextmanager
def _telling(console: Console, what: str) -> Iterator[Tell]:
    """Show the progress of some work in one line; without a terminal, in a line now and then."""
    with console.status("") as status:
        printed = time.monotonic()

        def tell(said: str) -> None:
            nonlocal printed
            status.update(f"{what}: {said}")
            if not console.is_terminal and time.monotonic() - printed > QUIET_SECONDS:
                printed = time.monotonic()
                console.print(f"{what}: {said}", highlight=False)

        yield tell


def _resolved(model: str, pairs: Path, out: Path, settings: Path | None) -> Resolved:
    given = {} if settings else _TRAINING
    return resolve(settings, {**given, "model": model, "data": [str(pairs)], "out": out})
