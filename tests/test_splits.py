"""Prompts that belong together are never in two splits."""

from __future__ import annotations

import pytest
from conftest import shared_file
from hypothesis import given
from hypothesis import strategies as st

from pairtune.config import Reading, SourceConfig
from pairtune.data.preference import PreferencePair
from pairtune.data.source_reader import SourceReader
from pairtune.data.splits import CONTINUED, NEAR, SAME, Prompt, draw_splits, find_leaks, group_prompts, prompt_key

LONG = "Please explain to a child of seven years why the sky is blue at noon but turns red at dawn and at dusk"


def talk(*said):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]


def prompt(*said):
    return Prompt.of(talk(*said))


def relation(a, b):
    """Why the second prompt leaks from the first one's split, or None."""
    return find_leaks([[a], [b]])[1].get(0)


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (("Why?",), ("  wHy? ",), SAME),
        (("Why?",), ("Why not?",), None),
        (("Hi", "Hello.", "Why?"), ("Hi",), CONTINUED),
        (("Hi",), ("Hi", "Hello.", "Why?"), CONTINUED),
        (("Hi", "Hello.", "Why?"), ("Hi", "Hello."), None),  # ends with an answer: no prompt that a row could have
        (("Hi", "Hello.", "Why?"), ("Hi", "Go away.", "How?"), None),
        ((LONG,), (LONG + " please",), NEAR),
        ((LONG,), (LONG.replace("blue", "grey").replace("noon", "night").replace("dawn", "eve"),), None),
    ],
)
def test_which_prompts_belong_together(one, other, reason):
    assert relation(prompt(*one), prompt(*other)) == reason


def test_roles_count_in_what_is_the_same():
    system = [{"role": "system", "content": "Hi"}, *talk("Why?")]
    assert relation(Prompt.of(system), prompt("Hi", "Why?", "Why?")) is None
    assert prompt_key(system) != prompt_key(talk("Hi Why?"))


def test_a_prompt_that_was_shortened_is_also_known_by_what_is_left():
    cut = Prompt.of(talk("a long story", "Yes.", "Why?"), talk("Why?"))
    assert relation(prompt("Why?"), cut) == SAME
    assert relation(cut, prompt("Why?")) == SAME
    assert relation(cut, Prompt.of(talk("another tale", "No.", "Why?"), talk("Why?"))) == SAME


RULES = " ".join(f"Rule {number}: never speak of topic {number * 7} before noon." for number in range(60))


def under(system, *said):
    return Prompt.of([{"role": "system", "content": system}, *talk(*said)])


def test_a_long_system_message_that_all_share_does_not_make_questions_near():
    questions = ["Why is the sky blue?", "Name three rivers in Asia.", "How do I boil an egg?", "Who wrote Faust?"]
    asked = [under(RULES, each) for each in questions]
    assert len(set(group_prompts(asked))) == len(asked)
    assert find_leaks([asked[:2], asked[2:]]) == [{}, {}]
    assert sorted(draw_splits(asked[:3], (0.1, 0.1), 0)) == [0, 1, 2]


def test_one_question_under_two_system_messages_belongs_together():
    assert relation(under(RULES, LONG), under("Be brief.", LONG + " please")) == NEAR
    assert relation(under(RULES, "Why?"), prompt("Why?")) == NEAR
    assert relation(under(RULES, "Why?"), under("Be brief.", "How?")) is None


def test_a_prompt_of_a_system_message_alone_is_known_by_it():
    """No sketch is empty, or all such prompts would share it."""
    assert relation(under("Be brief."), under("Answer in French.")) is None


def test_a_long_text_that_all_questions_begin_with_makes_them_near():
    """Undesirable, but documented: a sketch cannot tell shared text from text that sets a prompt apart."""
    assert relation(prompt(f"{RULES} Why is the sky blue?"), prompt(f"{RULES} Who wrote Faust?")) == NEAR


CHINESE = (
    "请用通俗易懂的语言向一个七岁的孩子解释为什么中午的天空是蓝色的而黎明和黄昏时分却会变成红色并且说明大气中的"
    "微小颗粒怎样散射不同波长的光线最后再举一个可以在家里用一杯水和一点牛奶完成的小实验帮助他理解这个现象"
)
JAPANESE = "七歳の子どもに、昼の空が青く見えるのに朝と夕方には赤く染まる理由を、やさしい言葉で説明してください。"
THAI = "ช่วยอธิบายให้เด็กอายุเจ็ดขวบเข้าใจหน่อยว่าทำไมท้องฟ้าตอนเที่ยงจึงเป็นสีฟ้าแต่กลับกลายเป็นสีแดงในตอนเช้าและตอนเย็น"


def test_near_copies_in_a_script_without_spaces_are_one_group():
    copies = [prompt(CHINESE[:at] + CHINESE[at + 1 :]) for at in range(len(CHINESE))]
    assert len(set(group_prompts(copies))) == 1


@pytest.mark.parametrize("length", [10, 12, 15, 20, 25, 30, 45])
def test_a_short_question_and_its_copies_without_a_character_are_one_group(length):
    text = CHINESE[:length]
    copies = [prompt(text), *(prompt(text[:at] + text[at + 1 :]) for at in range(length))]
    assert len(set(group_prompts(copies))) == 1
    assert all(relation(copies[0], copy) == NEAR for copy in copies[1:])


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, THAI, f"{CHINESE} with Python 3.12 and a little English"])
def test_a_character_is_a_word_where_there_are_no_spaces(text):
    assert relation(prompt(text), prompt(text[:20] + text[21:])) == NEAR
    assert relation(prompt(text), prompt(text[: len(text) // 2])) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("好", "嗨"),
        ("你好", "您好"),
        ("今天北京的天气怎么样?", "明天上海的天气怎么样?"),
        ("请问法国的首都是什么?", "请问德国的首都是什么?"),
        ("请写一首关于春天的诗歌。", "请写一首关于秋天的诗歌。"),
        ("光合作用是什么?请简单说明。", "相对论是什么?请简单说明。"),
        ("猫の名前を考えて", "犬の散歩のコツは?"),
    ],
)
def test_other_questions_in_a_script_without_spaces_stay_apart(one, other):
    assert relation(prompt(one), prompt(other)) is None
    assert relation(prompt(one), prompt(f" {one}\n")) == SAME


def test_words_with_spaces_are_whole_also_beside_other_scripts():
    """One letter makes a different word: 12 words with a different middle one share 7 of 13 shingles."""
    korean = "일곱 살 아이에게 낮 하늘이 왜 파란지 아주 쉬운 말로 설명해 주세요"
    assert relation(prompt(korean), prompt(korean.replace("파란지", "빨간지"))) is None


def test_groups_reach_over_others():
    prompts = [prompt("Hi"), prompt("Bye"), prompt("Hi", "Yes.", "Why?"), prompt("Hi", "No.", "How?"), prompt("BYE ")]
    groups = group_prompts(prompts)
    assert groups[0] == groups[2] == groups[3]
    assert groups[1] == groups[4] != groups[0]


def test_leaks_are_judged_against_what_was_kept():
    """The middle split's prompt leaks and is dropped, so the last split's may stay."""
    train, middle, last = prompt("Hi"), prompt("Hi", "Yes.", "Why?"), prompt("Hi", "Yes.", "Why?", "So.", "Oh?")
    assert find_leaks([[train], [middle], [last]]) == [{}, {0: CONTINUED}, {0: CONTINUED}]
    other = prompt(LONG)
    assert find_leaks([[other], [prompt(LONG + " a b c")], [prompt(LONG + " a b c d e f")]])[1:] == [{0: NEAR}, {}]


def test_a_share_is_of_the_groups_and_train_keeps_one():
    many = [prompt(f"{word} {word}") for word in "abcdefghijklmnopqrst"]
    assert [draw_splits(many, (0.1, 0.1), 0).count(split) for split in range(3)] == [16, 2, 2]
    assert [draw_splits(many, (0.0, 0.25), 0).count(split) for split in range(3)] == [15, 0, 5]
    assert sorted(draw_splits(many[:3], (0.1, 0.1), 0)) == [0, 1, 2]
    assert sorted(draw_splits(many[:2], (0.1, 0.1), 0)) == [0, 1]
    assert draw_splits(many[:1], (0.1, 0.1), 0) == [0]
    assert draw_splits([], (0.1, 0.1), 0) == []


def test_added_prompts_do_not_move_the_others_about():
    prompts = [prompt(f"{word} {word}") for word in "abcdefghijklmnopqrst"]
    before = draw_splits(prompts, (0.5,), 3)
    after = draw_splits([prompt("new"), *prompts, prompt("newer")], (0.5,), 3)[1:-1]
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 2
    assert draw_splits(prompts, (0.5,), 4) != before


words = st.lists(st.sampled_from(["why", "is", "it", "so", "Why", "hi"]), min_size=1, max_size=7).map(" ".join)
conversations = st.lists(words, min_size=1, max_size=5).filter(lambda said: len(said) % 2)


def belong_together(one, other):
    """By the plain definition, without hashes: equal, or one begins with the other."""
    flat = [[(turn["role"], " ".join(turn["content"].casefold().split())) for turn in turns] for turns in (one, other)]
    short, long = sorted(flat, key=len)
    return long[: len(short)] == short


@given(st.lists(conversations, max_size=14), st.integers(0, 3))
def test_no_conversation_is_ever_drawn_for_two_splits(said, seed):
    talks = [talk(*each) for each in said]
    splits = draw_splits([Prompt.of(turns) for turns in talks], (0.2, 0.2), seed)
    for one, split in zip(talks, splits, strict=True):
        for other, another in zip(talks, splits, strict=True):
            assert split == another or not belong_together(one, other)


@given(st.lists(conversations, max_size=8), st.lists(conversations, max_size=8))
def test_no_conversation_is_left_in_two_given_splits(train, held):
    train, held = [talk(*each) for each in train], [talk(*each) for each in held]
    leaks = find_leaks([[Prompt.of(turns) for turns in split] for split in (train, held)])
    assert not leaks[0]
    for number, turns in enumerate(held):
        if any(belong_together(turns, other) for other in train):
            assert number in leaks[1]
        elif number in leaks[1]:
            assert leaks[1][number] == NEAR


@pytest.mark.parametrize("name", ["hh_harmless_2000.jsonl.gz", "rm_static_train.jsonl.gz", "sharegpt_dpo_en_demo.json"])
def test_no_real_conversation_stands_in_two_splits(name):
    reader = SourceReader.open(SourceConfig(source=str(shared_file(name))), "--data", Reading(), None)
    talks = [pair.prompt for _, pair in reader.parsed() if isinstance(pair, PreferencePair)]
    splits = draw_splits([Prompt.of(turns) for turns in talks], (0.1, 0.1), 0)
    assert min(splits.count(split) for split in range(3)) > 0.05 * len(talks)
    whole = {}
    for turns, split in zip(talks, splits, strict=True):
        flat = tuple((turn["role"], " ".join(turn["content"].casefold().split())) for turn in turns)
        assert whole.setdefault(flat, split) == split
    for flat, split in whole.items():
        for end in range(1, len(flat)):
            assert whole.get(flat[:end], split) == split


@given(st.lists(st.booleans(), min_size=8, max_size=60), st.integers(0, 20))
def test_splits_of_single_answers_have_both_kinds_where_there_are_enough(kinds, seed):
    prompts = [prompt(f"Question {number} about something else entirely?") for number in range(len(kinds))]
    splits = draw_splits(prompts, (0.1, 0.1), seed, None, kinds)
    held_out = sum(split > 0 for split in draw_splits(prompts, (0.1, 0.1), seed))
    assert held_out <= sum(split > 0 for split in splits) <= held_out + 2
    of_split = [{kind for kind, of in zip(kinds, splits, strict=True) if of == split} for split in (0, 1, 2)]
    if min(kinds.count(True), kinds.count(False)) > held_out + 2:
        assert of_split == [{True, False}] * 3
