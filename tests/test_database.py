"""Databases of every earlier version are migrated with all that is in them, and shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("django")

MIGRATIONS = sorted((Path(__file__).parents[1] / "src" / "pairtune" / "web" / "migrations").glob("0*.py"))

# Fills every table as that version had it, with what a person would not want to lose.
FILL = """
import django
django.setup()
from django.conf import settings
settings.PAIRTUNE_SITE.mkdir(parents=True, exist_ok=True)
from django.core.management import call_command
from django.db import connection
from django.db.migrations.loader import MigrationLoader
call_command("migrate", "web", {name!r}, verbosity=0)
apps = MigrationLoader(connection).project_state(("web", {name!r})).apps
made = {{}}
def value(field):
    kind = field.get_internal_type()
    if field.name == "voter": return "somebody"
    if field.name == "kind": return "thumb"
    if field.name == "outcome": return "up"
    if field.name == "state": return "done"
    if field.name == "model_names": return ["some-model"]
    if kind == "JSONField": return [] if field.name in ("prompt", "answers") else {{}}
    if kind in ("CharField", "TextField"): return f"kept {{field.name}}"[: field.max_length or 100]
    if kind == "BooleanField": return field.name == "up"
    if kind == "FloatField": return 1.5
    return 1
for name in ("conversation", "turn", "answer", "vote"):
    if ("web", name) not in {{("web", each._meta.model_name) for each in apps.get_models()}}: continue
    model = apps.get_model("web", name)
    fields = {{}}
    for field in model._meta.get_fields():
        if not getattr(field, "concrete", False) or field.primary_key or field.get_internal_type() == "DateTimeField":
            continue
        if field.is_relation:
            related = made.get(field.related_model._meta.model_name)
            if related is not None and field.name not in ("leaf", "parent", "right"): fields[field.name] = related
            continue
        if field.name != "arena": fields[field.name] = value(field)
    made[name] = model.objects.create(**fields)
if "turn" in made:
    made["conversation"].leaf = made["turn"]
    made["conversation"].save()
print(sorted(made))
"""

SHOW = """
from pairtune.web.server import open_database
open_database()
from django.test import Client
from pairtune.web.models import Conversation, Vote
client = Client(headers={"host": "localhost"})
pages = ["/", f"/chat/{Conversation.objects.get().pk}/", "/arena/standings", "/arena/votes.jsonl"]
pages.append("/chat/search?q=kept")
print([client.get(page).status_code for page in pages])
print("kept prompt" in client.get(pages[1]).content.decode(), "kept text" in client.get(pages[1]).content.decode())
print([vote.outcome for vote in Vote.objects.all()])
"""


@pytest.mark.parametrize("migration", [file.stem for file in MIGRATIONS])
def test_an_earlier_database_keeps_what_is_in_it(tmp_path, migration):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
        "DJANGO_SETTINGS_MODULE": "pairtune.web.settings",
        "PAIRTUNE_SITE": str(tmp_path),
        "PAIRTUNE_RUNS": str(tmp_path / "runs"),
        "PAIRTUNE_BACKEND": "http://127.0.0.1:9",
    }

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    made = run(FILL.format(name=migration))
    assert "'answer', 'conversation', 'turn'" in made
    pages, texts, votes = run(SHOW).splitlines()
    assert pages == "[200, 200, 200, 200, 200]"
    assert texts == "True True"
    assert votes == ("['up']" if "'vote'" in made else "[]")


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives every thread a heap of its own")
@pytest.mark.parametrize("shared", [True, False])
def test_threads_share_one_heap(shared):
    code = f"""
import ctypes, threading
from pairtune.web.server import keep_memory_level
if {shared}:
    keep_memory_level()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
together = threading.Barrier(6)
def take():
    for _ in range(1000):
        library.malloc(5000)  # ctypes lets go of Python's lock meanwhile
    together.wait()
threads = [threading.Thread(target=take) for _ in range(6)]
[each.start() for each in threads], [each.join() for each in threads]
library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
"""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "8"}  # whatever this machine's own setting is
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if "malloc_info" in done.stderr:
        pytest.skip("this C library is not glibc")
    assert (done.stdout.count("<heap nr=") == 1) is shared


@pytest.mark.parametrize("mapped", [False, True])
def test_large_texts_leave_no_holes(mapped):
    code = f"""
import ctypes
from pairtune.web.server import keep_memory_level
if {mapped}:
    keep_memory_level()
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
library.free(library.malloc(1_000_000))  # mapped and unmapped: from now on blocks of this size go on the heap
texts = []
for _ in range(100):
    texts.append(library.malloc(100_000))
    library.malloc(1000)  # stays
for text in texts:
    library.free(text)
library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "malloc_info" in done.stderr:
        pytest.skip("this C library is not glibc")
    rest = int(re.findall(r'<total type="rest" count="[0-9]+" size="([0-9]+)"', done.stdout)[-1])
    assert (rest < 2_000_000) is mapped
