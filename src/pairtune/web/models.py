"""What the site keeps: conversations, which are trees of turns, and the runs that it has started."""

from __future__ import annotations

from django.db import models


class Conversation(models.Model):
    """One conversation with one model, or with two side by side.

    Attributes:
        model_names: of the models that answer, one or two.
        sampling: temperature, top_p, max_tokens and seed, as they were last asked for.
        leaf: the turn that is shown last; an edited turn begins a branch of its own.
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
        """The turns up to one, the first one first; up to the last that is shown where none is named."""
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
    """What a person said, and the answers to it."""

    conversation = models.ForeignKey(Conversation, on_delete=models.CASCADE, related_name="turns")
    parent = models.ForeignKey("self", null=True, on_delete=models.CASCADE, related_name="children")
    prompt = models.TextField()
    created = models.DateTimeField(auto_now_add=True)

    def shown(self) -> list[Answer]:
        """The answers that are shown: the chosen one of each slot."""
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
    """One model's answer to a turn; asking again makes another one in the same slot.

    Attributes:
        slot: 0, or 1 for the second of two models side by side.
        state: `writing`, `done`, `stopped` by a person, or `failed`; what had come is kept in every case.
        fingerprint: of the weights, as the server of models stamped the answer.
        reason: why it ended (`stop` or `length`), or what failed.
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
    """A run that was started from the site, in a process of its own.

    Attributes:
        name: of the run's folder.
        pid: of the process.
        born: when the process was made, seconds since 1970: another process may get its number later.
        log: file with what it says.
    """

    name = models.CharField(max_length=200, unique=True)
    pid = models.PositiveIntegerField()
    born = models.FloatField()
    log = models.CharField(max_length=500)
    created = models.DateTimeField(auto_now_add=True)
