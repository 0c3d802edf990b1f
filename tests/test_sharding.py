"""Two processes that divide weights, gradients and optimizer follow the trajectory of one that has them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, write_pairs
from safetensors.torch import load_file
from sharded import CASES, run_case
from test_processes import free_port
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from pairtune.errors import Interrupted
from pairtune.run.folder import Run

TESTS = Path(__file__).parent


def in_two_processes(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-addr", "127.0.0.1", "--master-port", str(free_port()), *map(str, arguments)),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory) -> Path:
    """All cases in two processes, with the variables that Accelerate's launcher sets for FSDP."""
    out = tmp_path_factory.mktemp("shared")
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    done = in_two_processes(TESTS / "sharded.py", tiny_model, out, ",".join(CASES), **launched)
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "stderr").write_text(done.stderr)
    return out


def log_of(root: Path) -> list[dict]:
    (path,) = root.rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(root: Path) -> dict[str, torch.Tensor]:
    (path,) = (root / "trials").rglob("model.safetensors")
    return load_file(path)


def check_same(one: Path, two: Path, model: Path, close: float = 2e-5, change: float = 1e-3) -> None:
    """The same metrics at every step, and weights that changed by the same but for a small part of the change."""
    logs = [log_of(each) for each in (one, two)]
    assert len(logs[0]) == len(logs[1])
    for mine, other in zip(*logs, strict=True):
        assert mine == pytest.approx(other, abs=close, rel=close)
    mine, other = (weights_of(each) for each in (one, two))
    start = load_file(model / "model.safetensors")
    assert mine.keys() == other.keys() <= start.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype
    apart = sum((tensor.float() - other[name].float()).abs().sum() for name, tensor in mine.items())
    moved = sum((tensor.float() - start[name].float()).abs().sum() for name, tensor in mine.items())
    assert moved > 0
    assert apart < change * moved, f"{apart / moved:.2g}"


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("stopped", "failing")])
def test_the_trajectory_is_that_of_one_process(shared, tiny_model, tmp_path, name):
    result = run_case(name, tiny_model, tmp_path)
    assert result.status == "finished"
    rounded = {"close": 2e-2, "change": 0.2} if name == "bfloat16" else {}
    check_same(tmp_path, shared / name, tiny_model, **rounded)


def test_a_trial_that_fails_ends_in_all_processes(shared, tiny_model, tmp_path):
    """Its weights before the step that failed are gathered and saved."""
    assert run_case("failing", tiny_model, tmp_path).status == "failed"
    mine, other = (load_file(next(root.rglob("failed/model.safetensors"))) for root in (tmp_path, shared / "failing"))
    assert mine.keys() == other.keys()
    assert log_of(shared / "failing")[0] == pytest.approx(log_of(tmp_path)[0], abs=2e-5)


def test_nothing_is_warned_of(shared):
    """FSDP2 warns of views with gradients that leave a model."""
    assert "FSDP" not in (shared / "stderr").read_text()


def test_each_process_holds_half(shared):
    held = [json.loads((shared / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    for name in CASES:
        (mine, whole), (other, _) = (each[name] for each in held)
        assert mine + other == whole
        assert abs(mine - other) < 0.05 * whole


def test_a_run_of_two_processes_goes_on_in_one(shared, tiny_model, tmp_path):
    run = Run(shared / "stopped")
    assert run.paths.checkpoint.is_file()
    assert len(log_of(run.root)) == 5, "four steps, three of which end an epoch, and its evaluation"
    assert run_case("stopped", tiny_model, run.root).status == "finished"
    run_case("stopped", tiny_model, tmp_path)
    check_same(tmp_path, run.root, tiny_model)


def test_a_run_of_one_process_goes_on_in_two(tiny_model, tmp_path):
    begun = Run(tmp_path / "two" / "stopped")
    with pytest.raises(Interrupted):
        run_case("stopped", tiny_model, begun.root, CASES["stopped"][1])
    assert begun.paths.checkpoint.is_file()
    done = in_two_processes(TESTS / "sharded.py", tiny_model, tmp_path / "two", "stopped")
    assert done.returncode == 0, done.stderr[-3000:]
    run_case("stopped", tiny_model, tmp_path / "one")
    check_same(tmp_path / "one", begun.root, tiny_model)


FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "phi": (
        PhiForCausalLM,
        PhiConfig,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "mamba": (MambaForCausalLM, MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path):
    """Tied and untied heads, biases, padded rows, blocks within blocks, layers that this engine does not compute."""
    kind, config, sizes = FAMILIES[family]
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    kind(config(vocab_size=len(tokenizer), bos_token_id=0, **ends, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = in_two_processes(TESTS / "sharded.py", tmp_path / "model", tmp_path, "checkpointing")
    assert done.returncode == 0, done.stderr[-3000:]
    run_case("checkpointing", tmp_path / "model", tmp_path / "one")
    check_same(tmp_path / "one", tmp_path / "checkpointing", tmp_path / "model", close=5e-5)


def test_evaluation_in_another_dtype_is_refused(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(9))
    flags = ["--method", "full", "--dtype", "bfloat16", "--eval-dtype", "float32", "--out", tmp_path / "run"]
    done = in_two_processes("-m", "pairtune", "tune", "--model", tiny_model, "--data", data, *flags)
    assert done.returncode != 0
    assert "--eval-dtype float32: with --method full" in done.stderr
    assert not (tmp_path / "run").exists()
