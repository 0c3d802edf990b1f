"""The site's database: conversations, which are trees of turns, and the runs that it has started."""

from __future__ import annotations

from django.db import models


class Conversation(models.Model):
    """One conversation with one model, or with two side by side.

    Attributes:
        model_names: names of the one or two models that answer.
        sampling: temperature, top_p, max_tokens and seed of the last message.
        leaf: the last turn shown; an edited turn starts a new branch.
    """

    title = models.CharField(max_length=200)
    model_names = models.JSONField(default=list)
    sampling = models.JSONField(default=dict)
    leaf = models.ForeignKey("Turn", null=True, on_delete=models.SET_NULL, related_name="+")
    created = models.DateTimeField(auto_now_add=True)
    changed = models.DateTimeField(auto_now=True, db_index=True)

    class Meta:
        ordering = ("-changed",)

    def path(self, leaf: int | None = None) -> list[Turn]:
        """The turns from the first to `leaf`; by default to the last turn shown."""
        turns = {turn.pk: turn for turn in self.turns.prefetch_related("answers")}
        found, turn = [], turns.get(leaf or self.leaf_id)
        while turn:
            found.append(turn)
            turn = turns.get(turn.parent_id)
        for each in found:
            siblings = sorted(pk for pk, turn in turns.items() if turn.parent_id == each.parent_id)
            each.place, each.siblings = siblings.index(each.pk) + 1, len(siblings)
        return found[::-1]


class Turn(models.Model):
    """A user message and the answers to it."""

    conversation = models.ForeignKey(Conversation, on_delete=models.CASCADE, related_name="turns")
    parent = models.ForeignKey("self", null=True, on_delete=models.CASCADE, related_name="children")
    prompt = models.TextField()
    created = models.DateTimeField(auto_now_add=True)

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


class Answer(models.Model):
    """One model's answer to a turn; regenerating adds another one to the same slot.

    Attributes:
        slot: 0, or 1 for the second of two models side by side.
        state: `writing`, `done`, `stopped` by the user, or `failed`; the text so far is always kept.
        fingerprint: the weights' fingerprint, as the model server reported it.
        reason: the finish reason (`stop` or `length`), or the error.
    """

    turn = models.ForeignKey(Turn, on_delete=models.CASCADE, related_name="answers")
    slot = models.PositiveSmallIntegerField(default=0)
    current = models.BooleanField(default=True)
    model = models.CharField(max_length=300)
    fingerprint = models.CharField(max_length=200, blank=True)
    text = models.TextField(blank=True)
    state = models.CharField(max_length=10, default="writing")
    reason = models.TextField(blank=True)
    sampling = models.JSONField(default=dict)
    tokens = models.PositiveIntegerField(default=0)
    seconds = models.FloatField(default=0)
    created = models.DateTimeField(auto_now_add=True)


class Job(models.Model):
    """A run started from the site, in a process of its own.

    Attributes:
        name: the name of the run's folder.
        pid: the process id.
        born: the process's start, in Unix time; guards against a reused pid.
        log: the file with its output.
    """

    name = models.CharField(max_length=200, unique=True)
    pid = models.PositiveIntegerField()
    born = models.FloatField()
    log = models.CharField(max_length=500)
    created = models.DateTimeField(auto_now_add=True)
