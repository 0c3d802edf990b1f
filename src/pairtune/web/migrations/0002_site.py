import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("web", "0001_initial"),
    ]

    operations = [
        migrations.RenameField("Job", "name", "subject"),
        migrations.RenameField("Job", "log", "folder"),
        migrations.CreateModel(
            name="Draft",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("source", models.CharField(max_length=1000)),
                ("held_out", models.CharField(blank=True, max_length=1000)),
                ("model", models.CharField(max_length=500)),
                ("mixing", models.JSONField(default=dict)),
                ("columns", models.JSONField(default=dict)),
                ("confirmed", models.BooleanField(default=False)),
                ("settings", models.JSONField(default=dict)),
                ("created", models.DateTimeField(auto_now_add=True)),
            ],
        ),
        migrations.CreateModel(
            name="Preset",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=60, unique=True)),
                ("system", models.TextField(blank=True)),
                ("sampling", models.JSONField(default=dict)),
            ],
            options={
                "ordering": ("name",),
            },
        ),
        migrations.CreateModel(
            name="RunNote",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("run", models.CharField(max_length=200, unique=True)),
                ("text", models.TextField(blank=True)),
                ("tags", models.CharField(blank=True, max_length=200)),
            ],
        ),
        migrations.CreateModel(
            name="Vote",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("up", models.BooleanField()),
                ("created", models.DateTimeField(auto_now_add=True)),
                ("withdrawn", models.DateTimeField(null=True)),
            ],
            options={
                "ordering": ("pk",),
            },
        ),
        migrations.AlterModelOptions(
            name="conversation",
            options={"ordering": ("-pinned", "-changed")},
        ),
        migrations.AlterModelOptions(
            name="job",
            options={"ordering": ("pk",)},
        ),
        migrations.AddField(
            model_name="answer",
            name="remedy",
            field=models.CharField(blank=True, max_length=10),
        ),
        migrations.AddField(
            model_name="conversation",
            name="pinned",
            field=models.BooleanField(default=False),
        ),
        migrations.AddField(
            model_name="conversation",
            name="system",
            field=models.TextField(blank=True),
        ),
        migrations.AddField(
            model_name="job",
            name="detail",
            field=models.CharField(blank=True, max_length=200),
        ),
        migrations.AddField(
            model_name="job",
            name="kind",
            field=models.CharField(default="tune", max_length=10),
        ),
        migrations.AlterField(
            model_name="job",
            name="subject",
            field=models.CharField(db_index=True, max_length=200),
        ),
        migrations.AddIndex(
            model_name="conversation",
            index=models.Index(fields=["-pinned", "-changed"], name="conversations_as_listed"),
        ),
        migrations.AddField(
            model_name="vote",
            name="answer",
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name="votes", to="web.answer"),
        ),
    ]
