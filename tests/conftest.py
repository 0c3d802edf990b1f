"""Shared fixtures: a tiny model with random weights and a byte tokenizer, so that tests really train, in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any library reads it: tests reach no network

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pairtune.data.preference import PreferencePair
from pairtune.files import user_cache
from pairtune.models.load import LoadedBase, load_tokenizer
from pairtune.models.resolve import resolve_model
from pairtune.pipeline import tune
from pairtune.resolve_config import resolve
from pairtune.run.folder import Run
from pairtune.run.metrics import Evaluation, TrainingStep
from pairtune.track.sinks import Sink

pytest_plugins = ["site_server"]  # the site's fixtures

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Shells ignore Ctrl-C in what they start in the background, and so would every process that these tests stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ.get("PAIRTUNE_THREADS", "1")))  # test processes run side by side

# No test touches the site of whoever runs them; a folder that is only made if a test names no other.
os.environ["PAIRTUNE_SITE"] = os.path.join(tempfile.gettempdir(), f"pairtune-tests-{os.getpid()}")

# Tests that start processes, browsers or whole runs: `make test-slow`, so that `make test` stays within ten minutes.
SLOW = {
    *("test_access", "test_api", "test_arena", "test_chaos", "test_compare", "test_database"),
    *("test_draft", "test_first_command", "test_forms", "test_full_disk", "test_gguf", "test_light_install"),
    *("test_lock", "test_loop", "test_machine_doctor", "test_machines", "test_odd_runs"),
    *("test_plain_mistakes", "test_power", "test_publish", "test_report"),
    *("test_resume", "test_serve", "test_sharding", "test_site", "test_site_chat", "test_site_runs", "test_site_walk"),
    *("test_start", "test_trackers", "test_unpaired_runs", "test_votes", "test_wheel"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


# No deadline: the first draws in a fresh checkout build character tables, on busy machines.
settings.register_profile("pairtune", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pairtune")


# Like Gemma's: BOS first, and after every turn a special token without a role in the tokenizer.
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_SPECIALS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a ChatML template."""
    return _bytewise(SPECIALS, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def gemma_tokenizer(template: str | None = GEMMA) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with `<bos>` before plain text and Gemma's special tokens."""
    fast = _bytewise(GEMMA_SPECIALS, template, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", fast.bos_token_id)]
    )
    return fast


def _bytewise(specials: list[str], template: str | None, **roles: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user cache for the tests; only the bundled model, which is slow to create, comes from the real one."""
    models = user_cache() / "models"
    models.mkdir(parents=True, exist_ok=True)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "models").symlink_to(models.resolve())
    os.environ["PAIRTUNE_CACHE"] = str(cache)
    yield cache
    del os.environ["PAIRTUNE_CACHE"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer Llama with the byte tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", byte_tokenizer(), "<|im_start|>")


@pytest.fixture(scope="session")
def bos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer that begins plain text with BOS and has no template, like Llama's and Gemma's bases."""
    return save_tiny(tmp_path_factory.mktemp("models") / "plain", gemma_tokenizer(None), "<bos>")


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerFast, bos: str) -> Path:
    """Write a random two-layer Llama for this tokenizer into a folder."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.convert_tokens_to_ids(bos),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_base(tiny_model: Path) -> LoadedBase:
    """The tiny model opened in float32 on the CPU."""
    source = resolve_model(str(tiny_model))
    return LoadedBase(source, load_tokenizer(source), torch.float32, torch.device("cpu"))


def make_pair(
    number: int, chosen: str = "Yes, {} of them.", rejected: str = "No idea about {}, sorry."
) -> PreferencePair:
    """Make a small pair; different numbers give different prompts."""
    prompt = ({"role": "user", "content": f"Are there {number} apples?"},)
    return PreferencePair(prompt, chosen.format(number), rejected.format(number), f"test:{number}")


def write_pairs(path: Path, numbers) -> Path:
    """Write small pairs to a JSONL file."""
    rows = (make_pair(number, rejected="No {0}" * (number % 3 + 1)).conversational() for number in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_run(model: Path, folder: Path, **more) -> Run:
    """Run the tiny model on a handful of pairs to the end; `more` are settings by their names in the config."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(model),
        "data": [str(write_pairs(folder / "train.jsonl", range(8)))],
        "eval_data": [str(write_pairs(folder / "held.jsonl", range(20, 25)))],
        "test_data": [str(write_pairs(folder / "test.jsonl", range(40, 44)))],
        "learning_rate": [3e-3],
        "beta": [0.1],
        "epochs": [1],
        "dtype": "float32",
        "samples": 2,
        "out": folder / "run",
        **more,
    }
    run = tune(resolve(None, settings), Console(quiet=True))
    assert run is not None
    return run


def pairtune(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process, with no standard input."""
    return subprocess.run(
        [sys.executable, "-m", "pairtune", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("PAIRTUNE_THREADS", "1"), **environment},
    )


def evaluation(**numbers) -> Evaluation:
    """An evaluation with these metrics; all others are 0."""
    required = [name for name, field in Evaluation.model_fields.items() if field.is_required()]
    return Evaluation(**{**dict.fromkeys(required, 0), **numbers})


class Lines(Sink):
    """A sink that keeps the trials' log lines by name, and all notices."""

    def __init__(self) -> None:
        self.of: dict[str, list[dict]] = {}
        self.notices: list[str] = []

    def start(self, trial: str, total_steps: int, steps: int, lines: int) -> None:
        self.of[trial] = self.of.get(trial, [])[:lines]

    def log(self, trial: str, line: TrainingStep | Evaluation) -> None:
        self.of[trial].append(line.metrics())

    def notice(self, text: str) -> None:
        self.notices.append(text)


def train_one(engine, config, inputs, folder: Path):
    """Run one trial and return its result, log lines and folder."""
    lines, run = Lines(), Run(folder)
    (result,) = engine.run_trials([config], inputs, run, lines)
    return result, lines.of[config.name], run.paths.trial(config.name)


SHARED = Path(__file__).parents[2] / "shared" / "data"


def shared_file(name: str) -> Path:
    """A file of real pairs that developers' machines have next to the project."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not here: real pairs are kept beside the project, not in it")
    return path
