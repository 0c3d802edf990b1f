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
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

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
    return out


def log_of(root: Path) -> list[dict]:
    (path,) = root.rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(root: Path) -> dict[str, torch.Tensor]:
    (path,) = (root / "trials").rglob("model.safetensors")
    return load_file(path)


def check_same(one: Path, two: Path, close: float) -> None:
    """The same metrics at every step, and the same weights but for `close`."""
    logs = [log_of(each) for each in (one, two)]
    assert len(logs[0]) == len(logs[1])
    for mine, other in zip(*logs, strict=True):
        assert mine == pytest.approx(other, abs=close, rel=close)
    weights = [weights_of(each) for each in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.dtype == weights[1][name].dtype
        torch.testing.assert_close(tensor, weights[1][name], atol=close, rtol=close)


@pytest.mark.parametrize("name", [name for name, (_, stop) in CASES.items() if stop is None])
def test_the_trajectory_is_that_of_one_process(shared, tiny_model, tmp_path, name):
    result = run_case(name, tiny_model, tmp_path)
    assert result.status == "finished"
    check_same(tmp_path, shared / name, 2e-2 if name == "bfloat16" else 2e-5)


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
    check_same(tmp_path, run.root, 2e-5)


def test_a_run_of_one_process_goes_on_in_two(tiny_model, tmp_path):
    begun = Run(tmp_path / "two" / "stopped")
    with pytest.raises(Interrupted):
        run_case("stopped", tiny_model, begun.root, CASES["stopped"][1])
    assert begun.paths.checkpoint.is_file()
    done = in_two_processes(TESTS / "sharded.py", tiny_model, tmp_path / "two", "stopped")
    assert done.returncode == 0, done.stderr[-3000:]
    run_case("stopped", tiny_model, tmp_path / "one")
    check_same(tmp_path / "one", begun.root, 2e-5)


FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "phi": (
        PhiForCausalLM,
        PhiConfig,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path):
    """Tied and untied heads with biases, layers that this engine does not compute itself, padded and packed rows."""
    kind, config, sizes = FAMILIES[family]
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    kind(config(vocab_size=len(tokenizer), bos_token_id=0, **ends, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = in_two_processes(TESTS / "sharded.py", tmp_path / "model", tmp_path, "checkpointing")
    assert done.returncode == 0, done.stderr[-3000:]
    run_case("checkpointing", tmp_path / "model", tmp_path / "one")
    check_same(tmp_path / "one", tmp_path / "checkpointing", 5e-5)


def test_evaluation_in_another_dtype_is_refused(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", range(9))
    flags = ["--method", "full", "--dtype", "bfloat16", "--eval-dtype", "float32", "--out", tmp_path / "run"]
    done = in_two_processes("-m", "pairtune", "tune", "--model", tiny_model, "--data", data, *flags)
    assert done.returncode != 0
    assert "--eval-dtype float32: with --method full" in done.stderr
    assert not (tmp_path / "run").exists()
