"""What a tokenizer and its chat template add to a conversation: how it begins, and what ends an answer.

Conversations are rendered to text and tokenized without adding special tokens, as transformers'
`apply_chat_template` does: the template alone decides what surrounds the turns.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

# Markers that no chat template writes on its own.
_ASKED, _ANSWERED = "asked0", "answered0"


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins plain text with its beginning-of-sequence token (BOS), as Llama's and Gemma's do."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def leaves_out_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins plain text with BOS, but the chat template does not begin conversations with it.

    Raises:
        TemplateError: the template refuses a plain question and answer.
    """
    return adds_bos(tokenizer) and not _rendered(tokenizer).startswith(tokenizer.bos_token)


def special_tokens(tokenizer: Any) -> set[str]:
    """All special tokens, including those added without a role, which `all_special_tokens` omits."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def answer_end(tokenizer: Any) -> str | None:
    """The special token with which the chat template ends an answer (ChatML: `<|im_end|>`); None if it writes none.

    Raises:
        TemplateError: the template refuses a plain question and answer.
    """
    longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
    after = _rendered(tokenizer).rpartition(_ANSWERED)[2]
    found = re.search("|".join(map(re.escape, longest_first)), after)
    return found and found[0]


def end_token(tokenizer: Any) -> str:
    """The token that ends an answer: the chat template's if it writes one, else the tokenizer's end token."""
    try:
        end = answer_end(tokenizer)
    except TemplateError:  # for example, it requires a system message; its end token is then unknown
        end = None
    return end or str(tokenizer.eos_token)


def _rendered(tokenizer: Any) -> str:
    turns = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return text
