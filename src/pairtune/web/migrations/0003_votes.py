import django.db.models.deletion
from django.db import migrations, models


def complete(apps, schema_editor):
    """Thumbs given before get what votes hold; they were given in one session that nobody recorded."""
    votes, turns = apps.get_model("web", "Vote").objects, apps.get_model("web", "Turn").objects
    for vote in votes.select_related("answer__turn__conversation").iterator():
        answer = vote.answer
        turn, conversation = answer.turn, answer.turn.conversation
        before = []
        while turn:
            before.append({"role": "user", "content": turn.prompt})
            turn = turns.filter(pk=turn.parent_id).first()
            if turn:
                said = turn.answers.filter(slot=answer.slot).order_by("-current", "-pk").first()
                before.append({"role": "assistant", "content": said.text if said else ""})
        if conversation.system:
            before.append({"role": "system", "content": conversation.system})
        vote.kind, vote.outcome, vote.voter = "thumb", "up" if vote.up else "down", "before voters were recorded"
        vote.prompt = before[::-1]
        vote.answers = [
            {
                "model": answer.model,
                "fingerprint": answer.fingerprint,
                "text": answer.text,
                "tokens": answer.tokens,
                "finish": answer.reason,
                "sampling": answer.sampling,
            }
        ]
        vote.save()


class Migration(migrations.Migration):
    dependencies = [("web", "0002_site")]

    operations = [
        migrations.AddField("Conversation", "arena", models.BooleanField(db_index=True, default=False)),
        migrations.CreateModel(
            name="Answering",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("model", models.CharField(blank=True, max_length=300)),
                ("created", models.DateTimeField(auto_now_add=True)),
            ],
            options={"ordering": ("pk",)},
        ),
        migrations.AddField("Vote", "kind", models.CharField(max_length=20, default="")),
        migrations.AddField("Vote", "outcome", models.CharField(max_length=10, default="")),
        migrations.AddField("Vote", "prompt", models.JSONField(default=list)),
        migrations.AddField("Vote", "answers", models.JSONField(default=list)),
        migrations.AddField("Vote", "reason", models.TextField(blank=True, default="")),
        migrations.AddField("Vote", "voter", models.CharField(db_index=True, max_length=64, default="")),
        migrations.AddField(
            "Vote",
            "right",
            models.ForeignKey(
                null=True,
                on_delete=django.db.models.deletion.SET_NULL,
                related_name="votes_as_right",
                to="web.answer",
            ),
        ),
        migrations.RunPython(complete, migrations.RunPython.noop),
        migrations.RemoveField("Vote", "up"),
        migrations.AlterField(
            "Vote",
            "answer",
            models.ForeignKey(
                null=True, on_delete=django.db.models.deletion.SET_NULL, related_name="votes", to="web.answer"
            ),
        ),
        *(
            migrations.AlterField("Vote", name, field)
            for name, field in {
                "kind": models.CharField(max_length=20),
                "outcome": models.CharField(max_length=10),
                "prompt": models.JSONField(),
                "answers": models.JSONField(),
                "reason": models.TextField(blank=True),
                "voter": models.CharField(db_index=True, max_length=64),
            }.items()
        ),
    ]
