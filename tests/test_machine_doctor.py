"""`pairtune doctor`: its output for this machine and others."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import pairtune

from pairtune.doctor import diagnose
from pairtune.environment import describe_machine

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu vme sse4_2 avx avx2 avx512f avx512dq avx512_bf16 amx_bf16 amx_tile amx_int8
"""
LAPTOP = """processor\t: 0
model name\t: Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz
flags\t\t: fpu vme sse4_2 avx avx2 bmi2
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sve bf16 i8mm
"""


def machine(root, cpuinfo="", **files):
    texts = {"proc/cpuinfo": cpuinfo} | {f"sys/fs/cgroup/{name.replace('__', '.')}": files[name] for name in files}
    for path, text in texts.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return describe_machine(root=root)


def test_machines_are_told_by_their_instructions(tmp_path):
    xeon = machine(tmp_path / "xeon", XEON)
    assert xeon.processor == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert xeon.instructions == ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    assert machine(tmp_path / "laptop", LAPTOP).instructions == ["avx2"]
    assert machine(tmp_path / "arm", ARM).instructions == ["asimd", "bf16", "sve"]
    nothing = describe_machine(root=tmp_path / "none")
    assert nothing.instructions == []
    assert nothing.processor
    assert nothing.cores >= 1


def test_a_containers_share_counts(tmp_path):
    whole = describe_machine()
    memory = {"memory__max": f"{1 << 30}\n", "memory__current": f"{1 << 28}\n"}
    part = machine(tmp_path, LAPTOP, **memory, cpu__max="50000 100000\n")
    assert (part.memory_gb, part.memory_free_gb, part.cores) == (1.0, 0.75, 0.5)
    free = machine(tmp_path / "free", LAPTOP, memory__max="max\n", cpu__max="max 100000\n")
    assert (free.memory_gb, free.cores) == (whole.memory_gb, whole.cores)
    assert whole.cores <= len(os.sched_getaffinity(0))


def test_the_environments_settings_are_told(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    limits = describe_machine().limits
    assert limits["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "secret" not in str(limits)


def test_a_model_is_tried_and_the_choices_have_their_figures(tiny_model):
    found = diagnose(str(tiny_model), 64)
    choices = {choice.name: choice for choice in found.choices}
    assert set(choices) == {"dtype", "products", "threads", "checkpointing", "trials side by side"}
    assert choices["dtype"].value in ("float32", "bfloat16")
    assert "bfloat16" in choices["dtype"].why
    assert " ms" in choices["dtype"].why
    assert choices["threads"].value == str(torch.get_num_threads())
    assert found.probes[choices["dtype"].value].bits
    assert 1 <= int(choices["trials side by side"].value) <= 4
    assert found.usable
    assert found.verdict.startswith("ready")


def test_without_a_model_it_says_so_and_goes_on(tmp_path):
    found = diagnose(str(tmp_path / "nothing.gguf"), 64)
    assert not found.usable
    assert found.verdict.startswith("not usable: model")
    assert {part.name for part in found.parts} >= {"cache", "disk", "browser", "wandb"}


def test_the_command_prints_one_object_or_a_page(tiny_model, tmp_path):
    printed = pairtune("doctor", "--model", tiny_model, "--json")
    assert printed.returncode == 0, printed.stderr
    record = json.loads(printed.stdout)
    assert record["usable"]
    assert {choice["name"] for choice in record["choices"]} >= {"dtype", "threads"}
    page = pairtune("doctor", "--model", tiny_model)
    assert page.stdout.rstrip().splitlines()[-1].startswith("ready")
    assert "settings chosen for" in page.stdout
    (tmp_path / "file").write_text("")
    spoilt = pairtune("doctor", "--model", tiny_model, PAIRTUNE_CACHE=str(tmp_path / "file" / "cache"))
    assert spoilt.returncode == 1
    assert "set PAIRTUNE_CACHE" in " ".join(spoilt.stdout.split())
    assert "Traceback" not in spoilt.stderr


@pytest.mark.parametrize("width", [80, 140])
def test_no_word_of_a_home_folder(tiny_model, width, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    says = " ".join(part.says for part in diagnose(str(tiny_model), 64).parts)
    assert str(tiny_model.parent) not in says
