"""Datasets from the Hub: the real client libraries against a fake Hub on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hub import serve_dataset

READ = """
import json, sys
from pairtune.config import SourceConfig
from pairtune.data.sources import open_source
from pairtune.errors import BadInput
for name, limit in json.loads(sys.argv[1]):
    source = open_source(SourceConfig(source=name), "--data")
    try:
        rows = [[row.file, row.number, row.content["prompt"]] for row in source.rows(limit)]
        print(json.dumps([rows, source.fingerprint()]))
    except BadInput as error:
        print(json.dumps(str(error)))
"""


def lines(*prompts):
    return "".join(json.dumps({"prompt": prompt, "chosen": "c", "rejected": "r"}) + "\n" for prompt in prompts).encode()


def read(endpoint, home, *wanted, offline=False):
    """Read in a fresh process, since the libraries take the endpoint from the environment at import."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(wanted)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub():
    revisions = {
        "new": {"README.md": b"# pairs\n", "data/train.jsonl": lines("a", "b", "c"), "data/test.jsonl": lines("d")},
        "v1": {"data/train.jsonl": lines("old")},
    }
    with serve_dataset("org/pairs", revisions) as endpoint:
        yield endpoint


def test_splits_revisions_and_limits(hub, tmp_path):
    everything, test, some, old = read(
        hub,
        tmp_path,
        ("org/pairs", None),
        ("org/pairs@test", None),
        ("org/pairs@train", 2),
        ("org/pairs@train#v1", None),
    )
    assert everything[0] == [["org/pairs", 1, "a"], ["org/pairs", 2, "b"], ["org/pairs", 3, "c"]]
    assert test[0] == [["org/pairs@test", 1, "d"]]
    assert [row[2] for row in some[0]] == ["a", "b"]
    assert [row[2] for row in old[0]] == ["old"]
    assert everything[1] == some[1], "the same split under two names is the same content"
    assert len({everything[1], test[1], old[1]}) == 3


def test_what_was_fetched_is_read_again_without_a_network(hub, tmp_path):
    ((fetched, _),) = read(hub, tmp_path, ("org/pairs@train", None))
    ((again, _),) = read("http://127.0.0.1:9", tmp_path, ("org/pairs@train", None), offline=True)
    assert again == fetched


def test_a_split_a_revision_or_a_data_set_that_does_not_exist(hub, tmp_path):
    messages = read(hub, tmp_path, ("org/pairs@dev", None), ("org/pairs#v9", None), ("org/none", None))
    for name, message in zip(("org/pairs@dev", "org/pairs#v9", "org/none"), messages, strict=True):
        assert message.startswith(f"--data {name}: ")
        assert "\n" not in message
    assert "dev" in messages[0].split("Hub", 1)[1]
