"""Ollama's `Modelfile`: a model's chat template translated into Ollama's own template language."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from pairtune.chat_templates import adds_bos, end_token

# The GGUF file that a Modelfile names, and the types that its matrices may have. The gguf package writes all of them
# but q4_k_m, for which llama.cpp itself is needed; of its own four-bit types, q4_1 is the closest (5.0 and 4.8 bits).
MODEL_FILE = "model.gguf"
Quantisation = Literal["f16", "q8_0", "q4_k_m", "q4_1"]
QUANTISATIONS: tuple[Quantisation, ...] = ("f16", "q8_0", "q4_k_m", "q4_1")

# Placeholders that occur in no template.
_SYSTEM, _USER, _ANSWER, _NEXT = "<<system>>", "<<user>>", "<<answer>>", "<<next>>"


@dataclass(frozen=True)
class Pieces:
    """The text around the parts of a conversation.

    Attributes:
        system: before and after a system message.
        user: before a user message, and between it and the answer.
        answer: after an answer.
        default: the system message that the template writes when none is given; empty if it writes none.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    answer: str
    default: str


def modelfile(weights: str, tokenizer: Any) -> str:
    """The file's text: weights, stop sequences, and the template if Ollama's language can express it."""
    ends = dict.fromkeys([end_token(tokenizer), tokenizer.eos_token])
    lines = [f"FROM ./{weights}", *(f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends)]
    if (pieces := template_pieces(tokenizer)) is None:
        lines.append("# The chat template cannot be expressed in this language; Ollama uses the one in the GGUF file.")
        return "\n".join(lines) + "\n"
    before, after = pieces.system
    asked, answering = pieces.user
    template = (
        f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ end }}}}"
        f"{{{{ if .Prompt }}}}{asked}{{{{ .Prompt }}}}{answering}{{{{ end }}}}{{{{ .Response }}}}{pieces.answer}"
    )
    lines.append(f'TEMPLATE """{template}"""')
    if pieces.default:
        lines.append(f'SYSTEM """{pieces.default}"""')
    return "\n".join(lines) + "\n"


def template_pieces(tokenizer: Any) -> Pieces | None:
    """Split a chat template by rendering conversations of placeholders; None if the pieces do not reproduce it.

    The end token separates what closes an answer from what opens the next message. The pieces are reassembled and
    compared with the template's own rendering.
    """
    dialogue = [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)]
    try:
        plain = _render(tokenizer, dialogue)
        full = _render(tokenizer, [("system", _SYSTEM), *dialogue])
        before, rest = full.split(_SYSTEM)
        opened, rest = rest.split(_USER)
        answering, rest = rest.split(_ANSWER)
        between, _ = rest.split(_NEXT)
        alone, _ = plain.split(_USER)
    except (TemplateError, ValueError):
        return None  # the template takes no system message, or writes a message twice
    end = end_token(tokenizer)
    if not between.startswith(end):
        return None
    asked = between.removeprefix(end).lstrip()
    answer = between.removesuffix(asked)
    if not opened.endswith(asked) or not alone.endswith(asked):
        return None
    after, default = opened.removesuffix(asked), ""
    if alone != asked:
        default = alone.removesuffix(asked).removeprefix(before).removesuffix(after)
    found = Pieces((before, after), (asked, answering), answer, default)
    rounds = [(_USER, _ANSWER), (_NEXT, "")]
    made = (_assemble(found, system, rounds) for system in (_SYSTEM, default))
    return found if [*made] == [full, plain] and '"""' not in str(found) else None


def _render(tokenizer: Any, turns: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text  # llama.cpp adds it


def _assemble(pieces: Pieces, system: str, rounds: list[tuple[str, str]]) -> str:
    """How Ollama renders a conversation whose last answer is still to come."""
    text = system.join(pieces.system) if system else ""
    for said, answer in rounds:
        text += said.join(pieces.user) + (answer + pieces.answer if answer else "")
    return text
