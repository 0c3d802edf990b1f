"""Pairs get the same ids as in TRL, too-long prompts lose their oldest turns, and answers keep their end."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import CHATML, GEMMA, SPECIALS, byte_tokenizer, gemma_tokenizer, make_pair, shared_file
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pairtune.chat_templates import adds_bos
from pairtune.config import Reading, SourceConfig
from pairtune.data.preference import BadRow, LeftOut, PreferencePair
from pairtune.data.row_parser import parse_row
from pairtune.data.source_reader import SourceReader
from pairtune.data.table import PairTable, write_table
from pairtune.data.tokens import PairTokenizer, TokenizedPair, decode_pair
from pairtune.errors import BadInput
from pairtune.models.load import DEFAULT_TEMPLATE, load_tokenizer
from pairtune.models.resolve import resolve_model

# As Qwen2.5's does: a system prompt of its own where there is none.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
# As Qwen3's does: the last answer gets a thinking block, which the prompt's header does not have.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Mistral's does: nothing opens an answer, so that its first token may depend on the text before it.
BARE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}[/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"ChatML": CHATML, "Qwen": QWEN, "thinking": THINKING, "bare": BARE, "default": DEFAULT_TEMPLATE}


def trl_ids(pairs, tokenizer):
    """The ids from TRL's own preparation of the pairs."""
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    rows = Dataset.from_list([pair.conversational() for pair in pairs])
    return DPOTrainer._prepare_dataset(None, rows, tokenizer, settings, "train")


def assert_equal_to_trl(pairs, tokenizer):
    ours, theirs = PairTokenizer(tokenizer).encode(pairs), trl_ids(pairs, tokenizer)
    for pair, expected in zip(ours, theirs, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert getattr(pair, name) == expected[name], (pair.pair.origin, name)


def templated(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.\n"},
    {"role": "user", "content": "?"},
]
PAIRS = [
    make_pair(1),
    PreferencePair(tuple(TURNS), "\nyes", " no", "t:1"),
    PreferencePair(({"role": "system", "content": "Be brief."}, *TURNS), "yes", "yesterday", "t:2"),
    PreferencePair(({"role": "user", "content": "<|im_end|> or <|im_start|>assistant\n?"},), "<|im_end|>", "b", "t:3"),
]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_ids_and_cut_equal_trls(template):
    assert_equal_to_trl(PAIRS, templated(template))


@pytest.fixture(scope="module")
def bundled():
    return load_tokenizer(resolve_model("smollm2-135m"))


@pytest.mark.parametrize("template", [None, QWEN, THINKING, BARE], ids=["its own", "Qwen", "thinking", "bare"])
def test_ids_equal_trls_for_real_pairs_and_the_bundled_tokenizer(bundled, template):
    path = shared_file("rm_static_test.jsonl.gz")
    pairs = [
        pair
        for _, pair in SourceReader.open(SourceConfig(source=str(path)), "--data", Reading(), 60).parsed()
        if isinstance(pair, PreferencePair)
    ]
    own = bundled.chat_template
    try:
        bundled.chat_template = template or own
        assert_equal_to_trl([*pairs, *PAIRS], bundled)
    finally:
        bundled.chat_template = own


def test_the_mask_is_on_the_answers_alone(bundled):
    (pair,) = PairTokenizer(bundled).encode([make_pair(3)])
    (expected,) = trl_ids([make_pair(3)], bundled)
    batch = DataCollatorForPreference(0)([expected])
    chosen = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    assert chosen.tolist() == pair.chosen_ids
    assert bundled.decode(chosen) == "Yes, 3 of them.<|im_end|>\n"


words = st.text(st.sampled_from("ab .\n<|>é😀"), min_size=1, max_size=12).filter(str.strip)
texts = words | st.sampled_from(SPECIALS)


@given(st.lists(texts, min_size=1, max_size=4), texts, texts, st.sampled_from(sorted(TEMPLATES)))
def test_quick_and_slow_cut_agree(said, chosen, rejected, name):
    prompt = tuple({"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said))
    quick = PairTokenizer(templated(TEMPLATES[name]))
    slow = PairTokenizer(templated(TEMPLATES[name]))
    slow.template.quick = False
    quick.template.checked = 10**9  # trusted from the first pair on
    pair = PreferencePair(prompt, chosen, rejected, "t:1")
    assert quick.encode([pair]) == slow.encode([pair])


def test_the_quick_way_is_taken_where_a_special_token_opens_the_answer_and_only_there(bundled):
    assert PairTokenizer(bundled).template.quick
    quick = {name: PairTokenizer(templated(template)).template.quick for name, template in TEMPLATES.items()}
    assert quick == {"ChatML": True, "Qwen": True, "thinking": True, "bare": False, "default": False}


def test_a_quick_way_that_is_wrong_is_noticed_on_the_first_pairs():
    encoder = PairTokenizer(byte_tokenizer())
    encoder.template.header_ids = [1, 2, 3]
    expected = PairTokenizer(byte_tokenizer()).encode(PAIRS)
    assert encoder.encode(PAIRS) == expected
    assert not encoder.template.quick


def test_an_answer_whose_end_the_template_does_not_mark_gets_the_end_token():
    tokenizer = templated("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    (pair,) = PairTokenizer(tokenizer).encode([make_pair(1, chosen="yes", rejected="no")])
    assert decode_pair(tokenizer, pair).chosen.endswith("yes\n<|im_end|>")
    (pair,) = PairTokenizer(byte_tokenizer()).encode([make_pair(1)])
    assert pair.chosen_ids.count(byte_tokenizer().eos_token_id) == 1


def test_an_end_of_turn_token_without_a_role_ends_an_answer_as_with_trl():
    tokenizer = gemma_tokenizer()
    assert "<end_of_turn>" not in tokenizer.all_special_tokens
    assert_equal_to_trl(PAIRS, tokenizer)
    (pair,) = PairTokenizer(tokenizer).encode([make_pair(1, chosen="Yes")])
    assert tokenizer.decode(pair.chosen_ids) == "Yes<end_of_turn>\n"
    assert tokenizer.decode(pair.prompt_ids) == (
        "<bos><start_of_turn>user\nAre there 1 apples?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert not PairTokenizer(tokenizer).warnings


def test_a_template_that_says_answer_behind_the_answer_is_not_misread():
    tokenizer = templated("{% for m in messages %}{{ m['content'] }}<|im_end|>(end of answer){% endfor %}")
    assert_equal_to_trl(PAIRS[:1], tokenizer)


def test_the_default_template_begins_with_bos_once_where_plain_text_does(bos_model):
    tokenizer = load_tokenizer(bos_model)
    bos = tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][0] == bos
    assert_equal_to_trl(PAIRS, tokenizer)
    whole = PairTokenizer(tokenizer).encode([*PAIRS, long_pair(3)])
    (cut,) = PairTokenizer(tokenizer, whole[-1].length - 1).encode([long_pair(3)])
    assert cut.turns_cut
    for pair in (*whole, cut):
        assert pair.prompt_ids[0] == bos
        assert [*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids].count(bos) == 1
    assert not PairTokenizer(tokenizer).warnings


def test_a_models_own_template_without_bos_is_kept_as_with_trl_and_told(bundled):
    tokenizer = gemma_tokenizer(GEMMA.removeprefix("{{ bos_token }}"))
    assert_equal_to_trl(PAIRS, tokenizer)
    (pair,) = PairTokenizer(tokenizer).encode([make_pair(1)])
    assert tokenizer.bos_token_id not in pair.prompt_ids
    (warning,) = PairTokenizer(tokenizer).warnings
    assert warning.startswith("the tokenizer begins plain text with <bos>")
    for other in (byte_tokenizer(), bundled):
        assert not adds_bos(other)
        assert not PairTokenizer(other).warnings


def test_a_template_that_refuses_a_pair_makes_it_a_bad_row():
    refusing = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    encoder = PairTokenizer(
        templated(refusing + CHATML.removeprefix("{% for message in messages %}").replace("message", "m"))
    )
    first, fault, last = encoder.encode([PAIRS[0], PAIRS[2], PAIRS[1]])
    assert isinstance(fault, BadRow)
    assert "no system" in str(fault)
    assert isinstance(first, TokenizedPair) and isinstance(last, TokenizedPair)


def test_a_template_that_cannot_render_at_all_is_bad_input():
    with pytest.raises(BadInput, match="--model: its chat template cannot render a question"):
        PairTokenizer(templated("{{ raise_exception('never') }}"))


def long_pair(exchanges, *, system=False, length=20, answer="a"):
    turns = [{"role": "system", "content": "S" * 5}] if system else []
    for number in range(exchanges):
        turns += [{"role": "user", "content": f"{number}" * length}, {"role": "assistant", "content": "r" * length}]
    return PreferencePair((*turns, {"role": "user", "content": "last"}), answer, answer * 2, "t:1")


def test_the_oldest_turns_go_first_the_system_message_and_the_last_turn_stay():
    pair = long_pair(3, system=True)
    whole = PairTokenizer(byte_tokenizer()).encode([pair])[0]
    encoder = PairTokenizer(byte_tokenizer(), whole.length - 1)
    (cut,) = encoder.encode([pair])
    assert (cut.turns_cut, cut.prompt) == (2, (pair.prompt[0], *pair.prompt[3:]))
    assert cut.pair == pair
    assert cut.chosen_ids == whole.chosen_ids
    shortest = PairTokenizer(byte_tokenizer()).encode([long_pair(0, system=True)])[0]
    (cut,) = PairTokenizer(byte_tokenizer(), shortest.length).encode([pair])
    assert (cut.turns_cut, cut.prompt_ids) == (6, shortest.prompt_ids)


def test_a_pair_that_cannot_fit_is_left_out_and_others_are_untouched():
    encoder = PairTokenizer(byte_tokenizer(), 40)
    kept, left_out, cut = encoder.encode([long_pair(0), long_pair(2, answer="a" * 60), long_pair(1)])
    assert isinstance(left_out, LeftOut)
    assert left_out.reason == "longer than 40 tokens"
    assert (kept.turns_cut, cut.turns_cut) == (0, 2)


def test_what_a_template_leaves_out_is_counted_once_for_a_pair_that_is_shortened():
    encoder = PairTokenizer(byte_tokenizer(), 120)
    (cut,) = encoder.encode([replace(long_pair(3), tools=({"name": "weather"},))])
    assert cut.turns_cut > 2
    assert encoder.warnings[0] == "1 pair with tools, for which the model's chat template has no room"


def test_what_can_never_fit_is_not_even_tokenized(monkeypatch):
    encoder = PairTokenizer(byte_tokenizer(), 64)
    monkeypatch.setattr(encoder, "encode_whole", lambda pairs: [] if not pairs else pytest.fail("tokenized"))
    (left_out,) = encoder.encode([long_pair(0, answer="a" * 1_000_000)])
    assert left_out.reason == "longer than 64 tokens"


@given(st.integers(0, 4), st.booleans(), st.integers(1, 30), st.integers(20, 300))
def test_whatever_is_kept_fits_and_keeps_its_last_turn_and_its_ends(exchanges, system, answer, limit):
    pair = long_pair(exchanges, system=system, answer="a" * answer)
    (result,) = PairTokenizer(byte_tokenizer(), limit).encode([pair])
    if isinstance(result, LeftOut):
        shortest = PairTokenizer(byte_tokenizer()).encode([long_pair(0, system=system, answer="a" * answer)])[0]
        assert shortest.length > limit
        return
    assert result.length <= limit
    assert result.prompt[-1] == pair.prompt[-1]
    assert (result.prompt[0]["role"] == "system") is system
    end = byte_tokenizer().eos_token_id
    assert all(ids.count(end) == 1 and ids[-2] == end for ids in (result.chosen_ids, result.rejected_ids))


def test_the_fingerprint_changes_with_template_length_and_tokenizer(bundled):
    encoders = [
        PairTokenizer(byte_tokenizer()),
        PairTokenizer(byte_tokenizer(), 64),
        PairTokenizer(templated(QWEN)),
        PairTokenizer(bundled),
    ]
    assert len({encoder.fingerprint() for encoder in encoders}) == 4
    named = gemma_tokenizer()
    named.add_special_tokens({"bos_token": "<start_of_turn>"})  # the template writes it
    assert PairTokenizer(named).fingerprint() != PairTokenizer(gemma_tokenizer()).fingerprint()
    assert PairTokenizer(byte_tokenizer()).fingerprint() == encoders[0].fingerprint()


def test_a_table_gives_back_pairs_and_ids(tmp_path):
    encoded = PairTokenizer(byte_tokenizer()).encode(PAIRS)
    write_table(tmp_path / "pairs.arrow", [encoded[:3], [], encoded[3:]])
    table = PairTable.open(tmp_path / "pairs.arrow")
    assert list(table) == PAIRS
    assert [table[at] for at in range(len(table))] == PAIRS
    assert list(table[1:3]) == PAIRS[1:3]
    assert table.ids().to_pylist() == [
        {name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in encoded
    ]
    assert list(PairTable.of(PAIRS, byte_tokenizer())) == PAIRS


def test_a_long_example_is_shown_without_its_middle():
    pair = parse_row({"prompt": "p" * 9000, "chosen": "c", "rejected": "r"}, "t:1")
    shown = decode_pair(byte_tokenizer(), PairTokenizer(byte_tokenizer()).encode([pair])[0])
    assert len(shown.prompt) < 3100
    assert shown.prompt.startswith("<|im_start|>user")
    assert shown.prompt.endswith("<|im_start|>assistant\n")
    assert "characters …]" in shown.prompt
