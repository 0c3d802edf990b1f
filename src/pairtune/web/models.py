"""The site's database: conversations, which are trees of turns, votes, presets, notes, and the site's processes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from django.db import models

_FINGERPRINT = 16  # hex digits of one fingerprint; that of a tuned model is two with a plus between them


class Chats(models.Manager[models.Model]):
    """Only what belongs to chats: matches of the arena are shown by its own pages, without names before the vote.

    Args:
        field: leads from the model to the flag of its conversation.
    """

    def __init__(self, field: str = "arena") -> None:
        super().__init__()
        self._field = field

    def get_queryset(self) -> models.QuerySet[models.Model]:
        """Everything that belongs to chats."""
        return super().get_queryset().filter(**{self._field: False})


class Conversation(models.Model):
    """One conversation with up to four models side by side.

    Attributes:
        model_names: names of the models that answer, in the order in which they are shown.
        system: the system message; empty for none.
        sampling: temperature, top_p, max_tokens and seed of the last message.
        leaf: the last turn shown; an edited turn starts a new branch.
        pinned: whether it is listed first.
        arena: whether two anonymous models answer, for a vote; only the arena's pages show it.
    """

    title = models.CharField(max_length=200)
    model_names = models.JSONField(default=list)
    system = models.TextField(blank=True)
    sampling = models.JSONField(default=dict)
    leaf = models.ForeignKey("Turn", null=True, on_delete=models.SET_NULL, related_name="+")
    pinned = models.BooleanField(default=False)
    arena = models.BooleanField(default=False, db_index=True)
    created = models.DateTimeField(auto_now_add=True)
    changed = models.DateTimeField(auto_now=True, db_index=True)

    objects = models.Manager()
    chats = Chats()

    class Meta:
        ordering = ("-pinned", "-changed")
        indexes = (models.Index(fields=("-pinned", "-changed"), name="conversations_as_listed"),)

    def path(self, leaf: int | None = None) -> list[Turn]:
        """The turns from the first to `leaf`; by default to the last turn shown."""
        turns = {turn.pk: turn for turn in self.turns.prefetch_related("answers__votes", "answers__votes_as_right")}
        found, turn = [], turns.get(leaf or self.leaf_id)
        while turn:
            found.append(turn)
            turn = turns.get(turn.parent_id)
        for each in found:
            siblings = sorted(pk for pk, turn in turns.items() if turn.parent_id == each.parent_id)
            each.place, each.siblings = siblings.index(each.pk) + 1, len(siblings)
        return found[::-1]


class Turn(models.Model):
    """A user message and the answers to it.

    Attributes:
        place, siblings: which of its versions it is, and how many there are; set by `Conversation.path`.
    """

    conversation = models.ForeignKey(Conversation, on_delete=models.CASCADE, related_name="turns")
    parent = models.ForeignKey("self", null=True, on_delete=models.CASCADE, related_name="children")
    prompt = models.TextField()
    created = models.DateTimeField(auto_now_add=True)

    place = siblings = 1
    objects = models.Manager()
    in_chats = Chats("conversation__arena")

    @cached_property
    def shown(self) -> list[Answer]:
        """The answers shown: the current one of each slot."""
        slots: dict[int, list[Answer]] = {}
        for answer in sorted(self.answers.all(), key=lambda each: each.pk):
            slots.setdefault(answer.slot, []).append(answer)
        found = []
        for answers in (slots[slot] for slot in sorted(slots)):
            current = next((each for each in answers if each.current), answers[-1])
            current.place, current.alternatives = answers.index(current) + 1, len(answers)
            found.append(current)
        return found

    @property
    def streams(self) -> bool:
        """Whether one of the answers shown is being written."""
        return any(answer.state == "writing" for answer in self.shown)


class Answer(models.Model):
    """One model's answer to a turn; regenerating adds another one to the same slot.

    Attributes:
        slot: its position among the models side by side, from 0.
        state: `writing`, `done`, `stopped` by the user, or `failed`; the text so far is always kept.
        fingerprint: the weights' fingerprint, as the model server reported it.
        reason: the finish reason (`stop` or `length`), or the error.
        remedy: what helps after a failure: `again`, `shorten` or `models`; empty if nothing failed.
        place, alternatives: which of its slot's answers it is, and how many there are; set by `Turn.shown`.
    """

    turn = models.ForeignKey(Turn, on_delete=models.CASCADE, related_name="answers")
    slot = models.PositiveSmallIntegerField(default=0)
    current = models.BooleanField(default=True)
    model = models.CharField(max_length=300)
    fingerprint = models.CharField(max_length=200, blank=True)
    text = models.TextField(blank=True)
    state = models.CharField(max_length=10, default="writing")
    reason = models.TextField(blank=True)
    remedy = models.CharField(max_length=10, blank=True)
    sampling = models.JSONField(default=dict)
    tokens = models.PositiveIntegerField(default=0)
    seconds = models.FloatField(default=0)
    created = models.DateTimeField(auto_now_add=True)

    place = alternatives = 1
    objects = models.Manager()
    in_chats = Chats("turn__conversation__arena")

    @property
    def speed(self) -> float:
        """Tokens per second, the wait for the first one included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def of_base(self) -> bool:
        """Whether a model answered that is not tuned: its fingerprint names no weights besides the base's."""
        return len(self.fingerprint) == _FINGERPRINT

    @property
    def can_continue(self) -> bool:
        """Whether the answer was cut off before its end."""
        return bool(self.text) and (self.state in ("stopped", "failed") or self.reason == "length")

    @property
    def thumb(self) -> str:
        """`up`, `down` or empty: the vote that stands."""
        standing = [vote for vote in self.votes.all() if vote.kind == "thumb" and vote.withdrawn is None]
        return standing[-1].outcome if standing else ""

    @property
    def preferred(self) -> bool:
        """Whether a vote that stands prefers it to another answer."""
        return any(vote.outcome == "left" for vote in self.votes.all() if vote.withdrawn is None) or any(
            vote.outcome == "right" for vote in self.votes_as_right.all() if vote.withdrawn is None
        )


class Vote(models.Model):
    """A vote, with everything that is needed to trust it; it outlives the conversation that it was given in.

    Votes are never edited: a changed mind withdraws one and adds another.

    Attributes:
        kind, outcome, prompt, answers, reason: as in `pairtune.votes.records.Vote`.
        answer: the left answer, or the one that got a thumb; None once its conversation is deleted.
        right: the right answer.
        voter: the anonymous session.
        withdrawn: when it was withdrawn; None while it stands.
    """

    kind = models.CharField(max_length=20)
    outcome = models.CharField(max_length=10)
    prompt = models.JSONField()
    answers = models.JSONField()
    reason = models.TextField(blank=True)
    answer = models.ForeignKey(Answer, null=True, on_delete=models.SET_NULL, related_name="votes")
    right = models.ForeignKey(Answer, null=True, on_delete=models.SET_NULL, related_name="votes_as_right")
    voter = models.CharField(max_length=64, db_index=True)
    created = models.DateTimeField(auto_now_add=True)
    withdrawn = models.DateTimeField(null=True)

    class Meta:
        ordering = ("pk",)


class Answering(models.Model):
    """Which model answers when nobody has chosen one: the last entry; the one before it is a click away.

    Attributes:
        model: its name; empty: the one tuned last.
    """

    model = models.CharField(max_length=300, blank=True)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("pk",)


class Preset(models.Model):
    """A named system message with sampling parameters."""

    name = models.CharField(max_length=60, unique=True)
    system = models.TextField(blank=True)
    sampling = models.JSONField(default=dict)

    class Meta:
        ordering = ("name",)


class RunNote(models.Model):
    """What a person wrote about a run; tags are separated by spaces."""

    run = models.CharField(max_length=200, unique=True)
    text = models.TextField(blank=True)
    tags = models.CharField(max_length=200, blank=True)


class Draft(models.Model):
    """A run that is being prepared: its data, model and settings.

    Attributes:
        source: the data, as `--data` takes it.
        held_out: the validation data, as `--eval-data` takes it; empty: a tenth of the pairs is held out.
        model: the model to tune.
        mixing: weight and columns of single sources, by source, where a cloned run has them.
        columns: what the person said that columns hold, by part.
        confirmed: whether the person confirmed which answer is the better one.
        settings: the other settings, as they were last entered.
    """

    source = models.CharField(max_length=1000)
    held_out = models.CharField(max_length=1000, blank=True)
    model = models.CharField(max_length=500)
    mixing = models.JSONField(default=dict)
    columns = models.JSONField(default=dict)
    confirmed = models.BooleanField(default=False)
    settings = models.JSONField(default=dict)
    created = models.DateTimeField(auto_now_add=True)


class Job(models.Model):
    """A process that the site has started: a `pairtune` command that outlives the page and the site.

    Attributes:
        kind: `tune`, `resume`, `plan`, `export` or `push`.
        subject: what it works on: a run's name, or a draft's number.
        detail: what it makes, where a page shows it: the folder of an export, a repository.
        pid: the process id.
        born: the process's start, in Unix time; guards against a reused pid.
        folder: the folder with its output: `out` and `log`.
    """

    kind = models.CharField(max_length=10, default="tune")
    subject = models.CharField(max_length=200, db_index=True)
    detail = models.CharField(max_length=200, blank=True)
    pid = models.PositiveIntegerField()
    born = models.FloatField()
    folder = models.CharField(max_length=500)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("pk",)


def latest_jobs(kinds: tuple[str, ...]) -> Iterator[Job]:
    """The last job of each subject, of these kinds."""
    last = {job.subject: job for job in Job.objects.filter(kind__in=kinds)}
    yield from last.values()


class AccessKey(models.Model):
    """The key of a role, on a site that other machines can reach.

    Attributes:
        role: see `access.Role`.
        hash: SHA-256 of the key, which itself is kept nowhere.
    """

    role = models.PositiveSmallIntegerField(unique=True)
    hash = models.CharField(max_length=200)
