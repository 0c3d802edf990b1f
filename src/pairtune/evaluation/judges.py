"""Judges that need a model: a local reward model, or a chat model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pairtune.conversation import Conversation
from pairtune.errors import BadInput, RunFailed, one_line
from pairtune.evaluation.winrate import LOSS, TIE, WIN, ConciseJudge, Judge, Progress, RuleJudge, better
from pairtune.extras import require
from pairtune.files import fingerprint, user_cache, write_json
from pairtune.run.records import Answer

# The second key is sent to OpenAI only.
_KEY, _OPENAI_KEY, _OPENAI = "PAIRTUNE_JUDGE_KEY", "OPENAI_API_KEY", "api.openai.com"
# A reply that is a verdict: a letter or "tie", possibly bracketed, bold, introduced or followed by a reason.
# "A tie" is a tie; a sentence that only begins with a letter ("As an AI", "Both are good", "A good question") is not.
_VERDICT = re.compile(
    r"""[\W_]*
    (?:(?:my|the|final)\s+)*
    (?:(?:verdict|choice|winner|better(?:\s+(?:answer|one))?|answer|it)\b(?:\s+is|'s)?[\W_]*)*
    (?:(?:answer|option|response)[\W_]+)?
    (?P<said>(?:an?\s+)?tie\b|[abt]\b(?!'))
    (?:[\W_]+(?:is|wins|seems)(?:\s+(?:the\s+)?(?:better|best|winner|answer|one))*\b)?
    [\W_]*(?:\b(?:because|since|for)\b.*)?\Z""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_MOST_TOKENS = 16  # room for "Answer A is better."
# A judge with a larger share of unreadable replies is rejected.
_UNREADABLE_SHARE = 0.1
_LETTERS_PER_TOKEN = 4  # in English text, for the cost estimate
_ASKED = """Which of two answers to the conversation is better: more helpful, true, and no longer than needed?
The order and the length of the answers must not matter.

# Conversation
{conversation}

# Answer A
{a}

# Answer B
{b}

Reply with one letter: A, B, or T for a tie."""


def open_judge(name: str, judge_model: str | None) -> Judge:
    """Open the judge of `--judge`: `rule`, `concise`, an `http(s)://` endpoint, or a reward model (folder or Hub id).

    Raises:
        BadInput: the judge cannot be loaded.
    """
    if name == "rule":
        return RuleJudge()
    if name == "concise":
        return ConciseJudge()
    if name.startswith(("http://", "https://")):
        require("judge", f"--judge {name}")
        if not judge_model:
            raise BadInput("--judge-model: is required with an endpoint; give the name that the judge model has there")
        return EndpointJudge(name.rstrip("/"), judge_model)
    return RewardModelJudge.load(name)


def read_verdict(reply: str) -> str:
    """A, B or T; empty where a reply is no verdict."""
    found = _VERDICT.match(reply.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    if found is None:
        return ""
    return "T" if "tie" in found["said"].lower() else found["said"].upper()


@dataclass
class RewardModelJudge:
    """A sequence classifier with one output: the answer with the higher score wins."""

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str) -> RewardModelJudge:
        """Load a reward model with transformers.

        Raises:
            BadInput: it cannot be loaded, has more than one output, or has no chat template.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from pairtune.models.load import pick_device, why_unloadable
        from pairtune.models.resolve import resolve_model

        folder = resolve_model(name, "--judge").folder
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BadInput(f"--judge {name}: cannot be loaded as a reward model ({why_unloadable(error)})") from error
        if missing := sorted(info["missing_keys"]):  # they would be random, and so would the verdicts
            raise BadInput(f"--judge {name}: is not a reward model: it has no weights for {', '.join(missing[:3])}")
        if model.config.num_labels != 1:
            raise BadInput(f"--judge {name}: has {model.config.num_labels} outputs; a reward model has one")
        if tokenizer.chat_template is None:
            raise BadInput(f"--judge {name}: its tokenizer has no chat template, so it cannot be given a conversation")
        return cls(f"reward model {name}", model.to(pick_device()).eval(), tokenizer)

    def judge(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer], on_progress: Progress
    ) -> list[float]:
        scores = []
        for turns, mine, theirs in zip(prompts, ours, base, strict=True):
            scores.append(better(self.score(turns, mine.text), self.score(turns, theirs.text)))
            on_progress(len(scores))
        return scores

    def score(self, turns: Conversation, answer: str) -> float:
        """The reward of one answer; scored one at a time, so that padding plays no part."""
        import torch

        conversation = [*turns, {"role": "assistant", "content": answer}]
        inputs = self.tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            return float(self.model(**inputs.to(self.model.device)).logits[0, 0])


@dataclass
class EndpointJudge:
    """A chat model behind an OpenAI-compatible endpoint, asked twice with the answers swapped.

    An answer wins only if it wins in both orders; everything else is a tie. Verdicts are kept in the user cache, so
    that the same question is paid for once.

    Attributes:
        url: of the endpoint, up to and including `/v1`.
        model: the name of the chat model there.
    """

    url: str
    model: str

    @property
    def name(self) -> str:
        """The judge's name in reports, without credentials."""
        parts = urlsplit(self.url)
        return f"{self.model} at {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def estimate(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer]
    ) -> dict[str, int]:
        """The cost of asking: `calls`, and about how many `tokens` they send; cached verdicts cost nothing."""
        asked = [
            question
            for two in self._questions(prompts, ours, base)
            for question in two
            if not self._cached(question).is_file()
        ]
        return {"calls": len(asked), "tokens": sum(len(question) for question in asked) // _LETTERS_PER_TOKEN}

    def judge(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer], on_progress: Progress
    ) -> list[float]:
        scores, unreadable = [], 0
        for straight, swapped in self._questions(prompts, ours, base):
            first, second = self._ask(straight), self._ask(swapped)
            unreadable += (not first) + (not second)
            scores.append({("A", "B"): WIN, ("B", "A"): LOSS}.get((first, second), TIE))
            on_progress(len(scores))
        if unreadable > _UNREADABLE_SHARE * 2 * len(scores):
            raise RunFailed(
                f"--judge {self.name}: no verdict (A, B or T) in {unreadable} of {2 * len(scores)} replies; use a "
                "model that answers with one letter"
            )
        return scores

    def _questions(
        self, prompts: Sequence[Conversation], ours: Sequence[Answer], base: Sequence[Answer]
    ) -> Iterator[tuple[str, str]]:
        for turns, mine, theirs in zip(prompts, ours, base, strict=True):
            conversation = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            yield (
                _ASKED.format(conversation=conversation, a=mine.text, b=theirs.text),
                _ASKED.format(conversation=conversation, a=theirs.text, b=mine.text),
            )

    def _cached(self, question: str) -> Path:
        return user_cache() / "judged" / f"{fingerprint([self.url, self.model, question])}.json"

    def _ask(self, question: str) -> str:
        """A, B or T; empty where the reply is no verdict.

        Raises:
            RunFailed: the endpoint does not answer; earlier verdicts are kept.
        """
        cached = self._cached(question)
        if cached.is_file():
            return str(json.loads(cached.read_text(encoding="utf-8"))["said"])
        from openai import OpenAIError

        try:
            reply = self._client().chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=_MOST_TOKENS,
            )
        except OpenAIError as error:
            raise RunFailed(
                f"--judge {self.name}: {one_line(error, 160)}; verdicts so far are kept, run the command again to go on"
            ) from error
        text = reply.choices[0].message.content if reply.choices else None
        said = read_verdict(text or "")
        if not said:
            return ""
        write_json(cached, {"said": said})
        return said

    def _client(self) -> Any:
        from openai import OpenAI

        variables = (_KEY, _OPENAI_KEY) if urlsplit(self.url).hostname == _OPENAI else (_KEY,)
        key = next((os.environ[name] for name in variables if os.environ.get(name)), "none")
        return OpenAI(base_url=self.url, api_key=key, max_retries=4)
