"""What votes come to: standings that see through side and length, matches that tell most, pairs with an account."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from site_server import serving
from talker import talking
from voters import Voters

from pairtune.data.splits import Prompt, draw_splits
from pairtune.votes.matches import next_match, rarest_prompts
from pairtune.votes.pairs import harvest
from pairtune.votes.records import Vote, VotedAnswer
from pairtune.votes.standings import Matches, agreement, chances, fit, standings

# `make loop` takes more of each: a hundred simulations, ten thousand votes.
SIMULATIONS = int(os.environ.get("PAIRTUNE_SIMULATIONS", "8"))
VOTES = int(os.environ.get("PAIRTUNE_VOTES", "200"))


def vote(number: int, outcome: str, left: str = "a", right: str = "b", **more) -> Vote:
    texts = more.pop("texts", (f"{left} says", f"{right} says"))
    return Vote(
        id=number,
        kind=more.pop("kind", "arena"),
        outcome=outcome,
        prompt=more.pop("prompt", [{"role": "user", "content": "Why?"}]),
        answers=[
            VotedAnswer(model=model, text=text, tokens=10) for model, text in zip((left, right), texts, strict=True)
        ],
        voter=more.pop("voter", "one"),
        created="2026-01-01T00:00:00",
        **more,
    )


# ---- Standings ----


def test_chances_by_hand():
    """Strengths 2 and 0 nats, ties with weight 1: e : 1 : 1/e."""
    left, tie, right = chances(2.0, 0.0)
    total = math.e + 1 + 1 / math.e
    assert (left, tie, right) == pytest.approx((math.e / total, 1 / total, 1 / math.e / total))


def test_two_models_by_hand():
    """Without ties and with sides in balance, the strengths differ by the log odds; the wide prior hardly shows."""
    votes = []
    for number in range(600):
        first, second = ("a", "b") if number % 2 else ("b", "a")
        won = number % 6 not in (0, 1)  # a wins two thirds, as often on the left as on the right
        votes.append(vote(number, "left" if won == (first == "a") else "right", first, second, voter=str(number)))
    found = standings(votes)
    assert [each.model for each in found.models] == ["a", "b"]
    assert found.models[0].strength - found.models[1].strength == pytest.approx(math.log(2), abs=0.01)
    assert found.models[0].apart
    assert (found.models[0].wins, found.models[0].losses) == (400, 200)
    assert found.side.share == pytest.approx(0, abs=1e-9)


def test_the_fit_is_the_maximum():
    """No small change of any parameter is more probable: the gradient of the log posterior, numerically."""
    voters = Voters({"a": 1.0, "b": 0.0, "c": -1.0}, draw=random.Random(1))
    matches = Matches.of([voters.vote(*voters.draw.sample("abc", 2)) for _ in range(200)])
    found = fit(matches).values

    def posterior(values):
        ahead = matches.design @ values[:-1]
        logs = [math.log(chances(each, values[-1])[kind]) for each, kind in zip(ahead, matches.outcome, strict=True)]
        return sum(logs) - (values**2).sum() / 18

    best = posterior(found)
    for place in range(len(found)):
        for step in (-1e-3, 1e-3):
            changed = found.copy()
            changed[place] += step
            assert posterior(changed) < best + 1e-9


def test_people_who_differ_need_more_people_not_more_votes():
    """Three voters for a and one for b, two hundred votes each."""
    draw, votes = random.Random(5), []
    for number in range(800):
        voter = number % 4
        for_a = draw.random() < (0.97 if voter else 0.05)
        left, right = ("a", "b") if number % 8 < 4 else ("b", "a")
        votes.append(vote(number, "left" if for_a == (left == "a") else "right", left, right, voter=str(voter)))
    first = standings(votes).models[0]
    assert (first.model, first.apart, first.needed) == ("a", False, None)


def test_nothing_is_told_apart_by_few_votes():
    found = standings([vote(1, "left"), vote(2, "left", voter="two")])
    assert not found.models[0].apart
    assert found.models[0].needed > 0
    assert not found.side.shows
    assert not found.length.shows
    assert standings([]) is None
    assert standings([vote(1, "up", kind="thumb", right="a")]) is None


def test_withdrawn_votes_and_a_model_against_itself_do_not_count():
    counted = [vote(1, "left"), vote(2, "right"), vote(3, "tie")]
    ignored = [
        vote(4, "left", withdrawn="2026-01-02T00:00:00"),
        vote(5, "left", "a", "a", kind="regenerated", texts=("one", "two")),
    ]
    assert standings(counted + ignored).votes == 3


def test_a_name_that_was_given_twice_is_two_models():
    """A run that was repeated under its name has other weights, and a trial that has the winner's is the winner."""
    first, again = "a" * 16 + "+" + "1" * 16, "a" * 16 + "+" + "2" * 16
    votes = []
    for number, (left, weights) in enumerate([("run", first), ("run", again), ("run/trial", again)]):
        one = vote(number, "left", left, "base", voter=str(number))
        answers = [one.answers[0].model_copy(update={"fingerprint": weights}), one.answers[1]]
        votes.append(one.model_copy(update={"answers": answers}))
    found = {each.weights: each for each in standings(votes).models}
    assert (found[first].wins, found[again].wins) == (1, 2)
    assert (found[first].model, found[again].model) == ("run", "run/trial")
    named = {each.weights: each.model for each in standings([votes[0], votes[2], votes[1]]).models}
    assert (named[first], named[again]) == ("run (111111)", "run (222222)")


def test_agreement_by_hand():
    votes = [
        vote(1, "left", voter="one"),
        vote(2, "left", voter="two"),
        vote(3, "left", "b", "a", texts=("b says", "a says"), voter="three"),  # the same answers on other sides
        vote(4, "right", prompt=[{"role": "user", "content": "Else?"}], voter="four"),  # to another question
    ]
    found = agreement(votes)
    assert (found.share, found.pairs) == (1 / 3, 3)
    assert agreement(votes[:1]) is None


def test_simulated_voters_are_seen_through():
    """Order, side bias and length bias, in at least 95 of 100 simulations (fewer here; see SIMULATIONS)."""
    strengths = {"a": 1.5, "b": 0.5, "c": -0.5, "d": -1.5}
    right = Counter()
    for seed in range(SIMULATIONS):
        voters = Voters(strengths, draw=random.Random(seed))
        votes = [voters.vote(*voters.draw.sample("abcd", 2)) for _ in range(400)]
        found = standings(votes)
        order = [each.model for each in found.models] == list("abcd")
        side = found.side.interval[0] <= voters.side_effect <= found.side.interval[1]
        length = found.length.interval[0] <= voters.length_effect <= found.length.interval[1]
        right.update(order=order, side=side, length=length, all=order and side and length)
    print(f"\n{SIMULATIONS} simulations of 400 votes: {dict(right)}")
    assert right["all"] >= (0.95 * SIMULATIONS if SIMULATIONS >= 50 else SIMULATIONS - 2)


# ---- Matches ----


def test_sides_that_were_chosen_say_nothing_of_the_side():
    chats = [vote(number, "left", kind="side by side", voter=str(number % 5)) for number in range(50)]
    told = standings(chats).side
    assert (told.share, told.interval, told.shows) == (0.0, (-1.0, 1.0), False)
    drawn = [vote(100 + number, "left" if number % 2 else "right", voter=str(number % 3)) for number in range(30)]
    both = standings(chats + drawn).side
    assert both.share == 0 and not both.shows and both.interval[1] < 0.5


def votes_until_apart(how: str, seed: int, strengths: dict[str, float]) -> int:
    """How many votes it takes until every model is told from the next one, by the fit's own intervals."""
    voters = Voters(strengths, draw=random.Random(seed))
    votes: list[Vote] = []
    while len(votes) < 6000:
        pair = next_match(list(strengths), votes, how, voters.draw)
        votes += [voters.vote(*(pair if number % 2 else pair[::-1])) for number in range(4)]
        matches = Matches.of(votes)
        if len(matches.models) < len(strengths):
            continue
        found = fit(matches)
        order = np.argsort(-found.values[: len(strengths)])
        gaps = [
            (found.values[one] - found.values[other]) / math.sqrt(found.variance(one, other))
            for one, other in pairwise(order)
        ]
        if min(gaps) > 1.96:
            break
    return len(votes)


def test_informative_matches_need_a_third_fewer_votes():
    strengths = dict(zip("abcdefg", (2.6, 1.6, 1.1, 0.0, -1.2, -1.8, -3.0), strict=True))
    seeds = range(max(2, SIMULATIONS // 10))
    needed = {
        how: sum(votes_until_apart(how, seed, strengths) for seed in seeds) / len(seeds)
        for how in ("informative", "uniform")
    }
    print(f"\nvotes until seven models are told apart, mean of {len(seeds)}: {needed}")
    assert needed["informative"] < 2 / 3 * needed["uniform"]


def test_equal_models_do_not_take_all_matches():
    voters = Voters({"a": 0.0, "b": 0.0, "c": 0.5}, draw=random.Random(3))
    votes: list[Vote] = []
    for _ in range(300):
        votes.append(voters.vote(*next_match("abc", votes, "informative", voters.draw)))
    met = Counter(frozenset(answer.model for answer in each.answers) for each in votes)
    assert max(met.values()) < 0.8 * len(votes)


def test_new_models_meet_first_and_sides_are_drawn():
    votes = [vote(number, "left" if number % 2 else "right", voter=str(number)) for number in range(40)]
    draw = random.Random(0)
    matches = [next_match(["a", "b", "new"], votes, "informative", draw) for _ in range(200)]
    assert sum("new" in each for each in matches) > 160
    assert 60 < sum(left == "new" for left, _ in matches) < 140


def test_prompts_with_fewest_votes_come_first():
    votes = [vote(1, "left", prompt=[{"role": "user", "content": "Old?"}])]
    prompts = ["Old?", "New?", "Other?"]
    assert {rarest_prompts(prompts, votes, 1, random.Random(seed))[0] for seed in range(9)} == {"New?", "Other?"}
    assert rarest_prompts(prompts, votes, 5, random.Random(0))[-1] == "Old?"


# ---- Pairs ----


def test_pairs_and_their_account():
    votes = [
        vote(1, "left"),
        vote(2, "left", voter="two", reason="It is kinder."),
        vote(3, "right", voter="three"),
        vote(4, "tie", voter="four"),
        vote(5, "bad", voter="five"),
        vote(6, "left", voter="six", withdrawn="2026-01-02T00:00:00"),
        vote(7, "right", "b", "a", texts=("b says", "a says"), voter="two"),  # the same again, for a
        vote(8, "left", prompt=[{"role": "user", "content": "Who?"}]),
        vote(9, "right", prompt=[{"role": "user", "content": "Who?"}], voter="two"),
        vote(10, "left", texts=("same", "same")),
        vote(11, "left", texts=("", "b says")),
        Vote(
            id=12,
            kind="thumb",
            outcome="down",
            prompt=[{"role": "user", "content": "Where?"}],
            answers=[VotedAnswer(model="a", text="Nowhere.")],
            voter="one",
            created="",
        ),
    ]
    found = harvest(votes)
    assert len(votes) == found.used + found.left_out.total()
    assert dict(found.reasons) == {
        "tie": 1,
        "both bad": 1,
        "withdrawn": 1,
        "changed by the same voter": 1,
        "contradicted by as many votes": 2,
        "both answers are the same": 1,
        "an empty answer": 1,
        "a thumb, not a comparison": 1,
    }
    (pair,) = found.pairs
    assert pair["chosen"] == [{"role": "assistant", "content": "a says"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "b says"}]
    assert (pair["votes"]["for"], pair["votes"]["against"], pair["votes"]["ids"]) == (2, 1, [1, 3, 7])
    labels = {(row["prompt"][0]["content"], row["completion"][0]["content"]): row["label"] for row in found.labels}
    assert labels["Where?", "Nowhere."] is False
    assert labels["Why?", "b says"] is False
    assert ("Who?", "a says") not in labels  # contradicted


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["left", "right", "tie", "bad"]),
            st.sampled_from(["x", "y", ""]),
            st.sampled_from(["x", "y"]),
            st.sampled_from(["one", "two"]),
            st.booleans(),
        )
    )
)
def test_every_vote_is_accounted_for(drawn):
    votes = [
        vote(number, outcome, texts=(left, right), voter=voter, withdrawn="2026" if gone else None)
        for number, (outcome, left, right, voter, gone) in enumerate(drawn)
    ]
    found = harvest(votes)
    assert len(votes) == found.used + found.left_out.total()
    assert len(found.pairs) <= found.used


def test_a_tie_after_all_takes_a_vote_back():
    found = harvest([vote(1, "left"), vote(2, "tie")])
    assert found.pairs == []
    assert dict(found.reasons) == {"changed by the same voter": 1, "tie": 1}


def test_conversations_that_diverged_give_no_pair():
    one = vote(1, "left")
    answers = [
        answer.model_copy(update={"context": [{"role": "user", "content": answer.model}]}) for answer in one.answers
    ]
    found = harvest([one.model_copy(update={"answers": answers})])
    assert found.pairs == []
    assert found.reasons == [("the conversations differ before the answers", 1)]
    assert [row["label"] for row in found.labels] == [True, False]


@given(st.integers(0, 5), st.integers(1, 40), st.integers(0, 40))
def test_prompts_of_earlier_rounds_keep_their_split(seed, before, added):
    prompts = [
        Prompt.of([{"role": "user", "content": f"{number} {chr(97 + number % 26) * 9} {number * 7919}"}])
        for number in range(before + added)
    ]
    shares = (0.1, 0.1)
    first = draw_splits(prompts[:before], shares, seed)
    known = {prompt.whole[0]: split for prompt, split in zip(prompts, first, strict=False)}
    second = draw_splits(prompts, shares, seed + 1, known)
    assert second[:before] == first
    if before + added > 20:
        assert {0, 1, 2} <= set(second)


# ---- No acknowledged vote is lost ----

_SEED = """
import sys
from pairtune.web.server import open_database
open_database()
from pairtune.web.models import Answer, Conversation, Turn
many = int(sys.argv[1])
games = Conversation.objects.bulk_create(
    Conversation(title="match", arena=True, model_names=["a", "b"]) for _ in range(many)
)
turns = Turn.objects.bulk_create(Turn(conversation=each, prompt="Why?") for each in games)
Answer.objects.bulk_create(
    Answer(turn=turn, slot=slot, model="ab"[slot], text=f"{turn.pk} {slot}", state="done")
    for turn in turns for slot in (0, 1)
)
for game, turn in zip(games, turns):
    game.leaf = turn
Conversation.objects.bulk_update(games, ["leaf"], batch_size=500)
print(games[0].pk)
"""


class Crowd:
    """Voters on a range of matches; each notes the votes that the site acknowledged."""

    def __init__(self, url: str, matches: list[int]) -> None:
        self.acknowledged: set[int] = set()
        self._left, self._lock = matches, threading.Lock()
        self._threads = [threading.Thread(target=self._vote, args=(url,)) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _vote(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            try:
                page = client.get("/arena/").text
                token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page).group(1)
                while self._left:
                    with self._lock:
                        match = self._left.pop() if self._left else None
                    if match is None:
                        return
                    sent = {"outcome": "left", "csrfmiddlewaretoken": token}
                    if client.post(f"/arena/{match}/vote", data=sent).status_code == 302:
                        self.acknowledged.add(match)
            except (httpx.HTTPError, AttributeError):
                return  # the site was killed

    def wait(self, seconds: float | None = None) -> None:
        for thread in self._threads:
            thread.join(seconds)


def test_no_acknowledged_vote_is_lost_when_the_site_is_killed(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    kept = tmp_path / "kept"
    environment = {**os.environ, "PAIRTUNE_SITE": str(kept)}
    seeded = subprocess.run(
        [sys.executable, "-c", _SEED, str(VOTES)], env=environment, capture_output=True, text=True, check=True
    )
    first = int(seeded.stdout)
    left = list(range(first, first + VOTES))
    draw, acknowledged, kills = random.Random(VOTES), set(), 0
    with talking() as (address, _):
        while left:
            last = kills >= 20 or len(left) < VOTES / 10
            with serving(tmp_path / "runs", kept, "--backend", address) as site:
                crowd = Crowd(site.url, left)
                if not last:
                    threading.Event().wait(draw.uniform(0.3, 2.0) * max(1, VOTES / 2000))
                    site.process.send_signal(signal.SIGKILL)
                    kills += 1
                crowd.wait()
                acknowledged |= crowd.acknowledged
    assert kills >= 2
    database = sqlite3.connect(kept / "site.sqlite3")
    rows = database.execute(
        "select t.conversation_id from web_vote v join web_answer a on a.id = v.answer_id "
        "join web_turn t on t.id = a.turn_id"
    ).fetchall()
    found = Counter(number for (number,) in rows)
    print(f"\n{len(acknowledged)} votes acknowledged, {kills} kills, {len(found)} votes found")
    assert acknowledged <= found.keys()
    assert max(found.values()) == 1
    assert len(acknowledged) > VOTES / 2
    stored = database.execute("select answers, prompt from web_vote limit 1").fetchone()
    assert json.loads(stored[1]) == [{"role": "user", "content": "Why?"}]
