"""Logs of real TRL trainings on a tiny random model, for the audit: honest ones, and ones with a known fault.

`python tests/trl_runs.py FOLDER [PART]` writes those whose names contain PART into FOLDER/honest and FOLDER/faulty, and
leaves out those that are there; with `--record FILE` it then packs all of them into FILE, which `make test` audits.
"""

from __future__ import annotations

import atexit
import copy
import functools
import gc
import json
import lzma
import math
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any library reads it
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

Row = dict[str, Any]
State = dict[str, Any]
STATE = "trainer_state.json"
TRAIN_ROWS, EVAL_ROWS, STEPS = 40, 24, 60
# Another number makes another model and other pairs, for logs that no rule has been tried on.
SEED = int(os.environ.get("PAIRTUNE_ALARM_SEED", "0"))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # what adapters change

FILLERS = "apples bread clouds doors eggs frogs grass honey ink jam keys lamps milk nuts oats pens".split()
TRAINERS: dict[str, tuple[type, type]] = {
    "dpo": (DPOConfig, DPOTrainer),
    "cpo": (CPOConfig, CPOTrainer),
    "orpo": (ORPOConfig, ORPOTrainer),
}


@dataclass(frozen=True)
class Spec:
    """One folder of logs: what it is called, which fault it has ("" for none), and how it is made.

    `options` are what a user would give to `pairtune audit` along with the path; `facts` are what is true of the runs
    and need not stand in the log.
    """

    name: str
    fault: str
    logging_steps: float
    options: dict[str, Any]
    build: Callable[[Spec, Path], None] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)


def make(spec: Spec, folder: Path) -> Path:
    """Run TRL as the spec says and return the folder that a person would give to the audit."""
    folder.mkdir(parents=True, exist_ok=True)
    spec.build(spec, folder)
    return folder


# Models and data.


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every model here, of bytes; made here, so that nothing of Pairtune is needed to make logs."""
    words = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@functools.cache
def model_folder(seed: int = 7) -> Path:
    """The folder of a tiny random model, in scratch space that goes with this process."""
    root = Path(tempfile.mkdtemp(prefix="trl-runs-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    torch.manual_seed(seed + 1000 * SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer().eos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    return saved(LlamaForCausalLM(config), root / f"tiny-{seed}")


def fresh(folder: Path | None = None) -> PreTrainedModel:
    """A model read from its folder, which is also where TRL finds the reference."""
    return LlamaForCausalLM.from_pretrained(folder or model_folder(), dtype=torch.float32)


def answer(draw: random.Random, sign: str) -> str:
    """A few random words, most often with the one that tells chosen from rejected."""
    words = draw.choices(FILLERS, k=draw.randint(1, 3))
    if draw.random() < 0.8:
        words.insert(draw.randrange(len(words) + 1), sign)
    return " ".join(words)


def pairs(rows: int, seed: int, noise: float = 0.15, *, swapped: bool = False) -> datasets.Dataset:
    """Pairs that can be learnt, of which a share is labelled the other way round."""
    draw = random.Random(seed + 1000 * SEED)
    columns: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for number in range(rows):
        good, bad = answer(draw, "surely"), answer(draw, "never")
        if (draw.random() < noise) != swapped:
            good, bad = bad, good
        columns["prompt"].append(f"Any {draw.choice(FILLERS)} {number}? ")
        columns["chosen"].append(good)
        columns["rejected"].append(bad)
    return datasets.Dataset.from_dict(columns)


def number_of(text: str) -> int:
    """A number for a name, the same in every process."""
    return zlib.crc32(text.encode())


# Training.


def train(
    folder: Path,
    *,
    model: Any = None,
    base: Path | None = None,
    ref_model: PreTrainedModel | None = None,
    trainer: str = "dpo",
    trainer_class: type | None = None,
    rows: int = TRAIN_ROWS,
    eval_rows: int = EVAL_ROWS,
    data_seed: int | None = None,
    noise: float = 0.15,
    swapped: bool = False,
    same_data: bool = False,
    lora: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    prepare: Callable[[Trainer], None] | None = None,
    resume: str | None = None,
    card: bool | None = None,
    keep: bool = False,
    **settings: Any,
) -> Trainer:
    """Train once with TRL and leave in the folder what TRL leaves there, without weights.

    `base` is a model's folder, `model` a model that exists already, `prepare` changes the trainer before it trains,
    `keep` leaves the weights of checkpoints, and the other settings go to TRL under TRL's names.
    """
    data_seed = number_of(folder.parent.name) if data_seed is None else data_seed
    config_class, usual_class = TRAINERS[trainer]
    given: dict[str, Any] = {
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 128,
        **settings,
    }
    if "num_train_epochs" in settings:
        given.pop("max_steps")
    train_set = pairs(rows, data_seed, noise, swapped=swapped)
    eval_set = train_set if same_data else pairs(eval_rows, data_seed + 1, noise)
    more: dict[str, Any] = {"ref_model": ref_model} if trainer == "dpo" else {}
    running = (trainer_class or usual_class)(
        model=model if model is not None else fresh(base),
        args=config_class(output_dir=str(folder), **given),
        train_dataset=train_set,
        eval_dataset=eval_set if given["eval_strategy"] != "no" else None,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, target_modules=LINEAR, task_type="CAUSAL_LM") if lora else None,
        callbacks=list(callbacks),
        **more,
    )
    running.remove_callback(PrinterCallback)
    if prepare:
        prepare(running)
    running.train(resume_from_checkpoint=resume)
    if keep:
        return running
    leave(running, folder, number_of(folder.name + folder.parent.name) % 2 == 0 if card is None else card)
    return running


def leave(trainer: Trainer, folder: Path, card: bool) -> None:
    """Write what TRL leaves beside the weights, and remove the weights."""
    trainer.save_state()
    if card:
        trainer.create_model_card(model_name=folder.name)
    else:
        (folder / "README.md").unlink(missing_ok=True)  # a checkpoint brings one
    for checkpoint in folder.glob("checkpoint-*"):
        for file in checkpoint.iterdir():
            if file.name != STATE:
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def read(folder: Path) -> State:
    """The state that TRL saved in a trial's folder."""
    state: State = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def write(folder: Path, state: State) -> None:
    """Write a state into a trial's folder as TRL does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Honest runs.


def one(**settings: Any) -> Callable[[Spec, Path], None]:
    """A single run with these settings."""
    return grid(settings)


def grid(*trials: dict[str, Any]) -> Callable[[Spec, Path], None]:
    """Runs with these settings, one folder each; they share their data."""

    def build(spec: Spec, folder: Path) -> None:
        for number, settings in enumerate(trials, 1):
            train(folder / f"trial-{number}", **{"logging_steps": spec.logging_steps, **settings})

    return build


class Interrupt(TrainerCallback):
    """Ends a training after some steps, as somebody who presses Ctrl+C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def resumed(saved_at: int = 30, interrupted_at: int = 30) -> Callable[[Spec, Path], None]:
    """A run that was interrupted and resumed from its checkpoint."""

    def build(spec: Spec, folder: Path) -> None:
        trial = folder / "trial-1"
        settings = {"logging_steps": spec.logging_steps, "save_strategy": "steps", "save_steps": saved_at}
        train(trial, **settings, callbacks=[Interrupt(interrupted_at)], keep=True)  # type: ignore[arg-type]
        train(trial, **settings, resume=str(trial / f"checkpoint-{saved_at}"))  # type: ignore[arg-type]

    return build


def sft_base(folder: Path, seed: int) -> Path:
    """A copy of the tiny model, trained a little on the chosen answers."""
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = pairs(TRAIN_ROWS, seed)
    for _ in range(2):
        for start in range(0, TRAIN_ROWS, 8):
            part = texts[start : start + 8]
            lines = [prompt + chosen for prompt, chosen in zip(part["prompt"], part["chosen"], strict=True)]
            batch = tokenizer()(lines, return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return saved(model, folder)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model, so that it can be read again as another run's model and reference."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def scratch() -> Path:
    """A new folder that is no part of any log."""
    return Path(tempfile.mkdtemp(prefix="base-", dir=model_folder().parent))


def after_sft(spec: Spec, folder: Path) -> None:
    """Two trials from the base, and a third from a model that SFT made, which is also its reference."""
    grid({"beta": 0.1}, {"beta": 0.2})(spec, folder)
    train(folder / "trial-3-sft", base=sft_base(scratch(), 5), logging_steps=spec.logging_steps)


def second_round(rate: float, *, other_data: bool = False) -> Callable[[Spec, Path], None]:
    """A second round that starts from the first round's saved model, with that model as its reference."""

    def build(spec: Spec, folder: Path) -> None:
        settings: dict[str, Any] = {"logging_steps": spec.logging_steps, "learning_rate": rate}
        first = train(folder / "round-1", data_seed=21, **settings)
        second = saved(first.model, scratch())
        train(folder / "round-2", base=second, data_seed=31 if other_data else 21, **settings)

    return build


def stopped_early(spec: Spec, folder: Path) -> None:
    """A run that overfits and is stopped when its evaluation loss no longer falls."""
    train(
        folder / "trial-1",
        logging_steps=spec.logging_steps,
        learning_rate=2e-3,
        num_train_epochs=12,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )


def reference_given(spec: Spec, folder: Path) -> None:
    """A run whose reference is given, another object of the same weights."""
    train(folder / "trial-1", ref_model=fresh(), logging_steps=spec.logging_steps)


BEST_LOSS: dict[str, Any] = {
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}
BEST_ACCURACY: dict[str, Any] = {
    **BEST_LOSS,
    "metric_for_best_model": "eval_rewards/accuracies",
    "greater_is_better": True,
}
WARM: dict[str, Any] = {"warmup_steps": 6}


def honest(name: str, build: Callable[[Spec, Path], None], steps: float = 1, **facts: Any) -> Spec:
    """An honest run; `options` among the facts are what a user would give to the audit."""
    return Spec(name, "", steps, facts.pop("options", {}), build, facts)


def _losses() -> Iterable[Spec]:
    losses: dict[str, dict[str, Any]] = {
        "sigmoid": {},
        "hinge": {},
        "ipo": {},
        "exo_pair": {"label_smoothing": 1e-3},
        "nca_pair": {},
        "robust": {"label_smoothing": 0.1},
        "bco_pair": {},
        "sppo_hard": {},
        "aot": {},
        "aot_unpaired": {},
        "apo_zero": {},
        "apo_down": {},
        "discopop": {},
        "sigmoid_norm": {},
    }
    for loss, more in losses.items():
        yield honest(f"loss-{loss}", one(loss_type=loss, **more), loss=loss)
        yield honest(f"loss-{loss}-every-10", one(loss_type=loss, beta=0.3, **more), 10, loss=loss, beta=0.3)
    yield honest("loss-sigmoid-sft", one(loss_type=["sigmoid", "sft"]), loss=["sigmoid", "sft"])
    weights = [0.8, 0.2, 1.0]
    yield honest("loss-mpo", one(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=weights), 5, loss="several")
    yield honest("loss-sigmoid-hinge", one(loss_type=["sigmoid", "hinge"], loss_weights=[0.5, 0.5]), loss="several")
    yield honest("loss-sft-only", one(loss_type="sft"), loss="sft")
    yield honest("loss-weighted-wpo", one(use_weighting=True), loss="sigmoid")
    yield honest("loss-ld-alpha", one(ld_alpha=0.5), loss="sigmoid")
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        yield honest(f"divergence-{divergence}", one(f_divergence_type=divergence), divergence=divergence)
        yield honest(f"divergence-{divergence}-every-10", one(f_divergence_type=divergence, learning_rate=1e-3), 10)
    yield honest("cpo", one(trainer="cpo"), loss="cpo")
    yield honest("cpo-every-10", one(trainer="cpo"), 10, loss="cpo")
    yield honest("cpo-hinge", one(trainer="cpo", loss_type="hinge"), loss="cpo-hinge")
    yield honest("simpo", one(trainer="cpo", loss_type="simpo", cpo_alpha=0.0), loss="simpo")
    yield honest("simpo-every-10", one(trainer="cpo", loss_type="simpo", cpo_alpha=0.0, beta=2.0), 10, loss="simpo")
    yield honest("cpo-simpo", one(trainer="cpo", loss_type="simpo", cpo_alpha=0.5), 5, loss="cpo-simpo")
    yield honest("orpo", one(trainer="orpo"), loss="orpo")
    yield honest("orpo-every-10", one(trainer="orpo", learning_rate=1e-3), 10, loss="orpo")


def _schedules() -> Iterable[Spec]:
    for schedule in ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts"):
        yield honest(f"schedule-{schedule}", one(lr_scheduler_type=schedule))
        if schedule != "constant":
            yield honest(f"schedule-{schedule}-warm", one(lr_scheduler_type=schedule, **WARM), 5)
    cycles: dict[str, Any] = {"lr_scheduler_kwargs": {"num_cycles": 3}}
    yield honest("schedule-three-restarts", one(lr_scheduler_type="cosine_with_restarts", **cycles, **WARM))
    floor: dict[str, Any] = {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    yield honest("schedule-cosine-floor", one(lr_scheduler_type="cosine_with_min_lr", **floor))
    yield honest("schedule-inverse-sqrt", one(lr_scheduler_type="inverse_sqrt", **WARM))


def _batches_and_evaluations() -> Iterable[Spec]:
    for size in (1, 2, 8):
        yield honest(f"batch-{size}", one(per_device_train_batch_size=size))
    yield honest("batch-2-every-10", one(per_device_train_batch_size=2), 10)
    yield honest("batch-7-of-40", one(per_device_train_batch_size=7), 1)
    accumulate: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 30}
    yield honest("accumulated", one(**accumulate))
    yield honest("accumulated-every-10", one(**accumulate), 10)
    # 20 batches an epoch, so that every epoch's last step accumulates fewer.
    yield honest("accumulated-unevenly", one(**{**accumulate, "gradient_accumulation_steps": 3}))
    yield honest("logged-every-5", one(), 5)
    yield honest("logged-every-25", one(), 25)
    yield honest("logged-by-tenths", one(), 0.1)
    yield honest("logged-first-step", one(logging_first_step=True), 10)
    yield honest("logged-every-epoch", one(logging_strategy="epoch"), 10)
    yield honest("eval-every-7-steps", one(eval_strategy="steps", eval_steps=7))
    yield honest("eval-every-7-steps-every-10", one(eval_strategy="steps", eval_steps=7), 10)
    yield honest("eval-no", one(eval_strategy="no"))
    yield honest("eval-no-every-10", one(eval_strategy="no"), 10)
    yield honest("eval-no-and-steps-left", one(eval_strategy="no"), 25)
    yield honest("eval-on-start", one(eval_on_start=True))
    yield honest("eval-on-start-every-10", one(eval_on_start=True, lora=True), 10)
    for rows in (5, 10, 40, 48):
        yield honest(f"eval-{rows}-rows", one(eval_rows=rows), eval_rows=rows)
    yield honest("eval-24-rows-by-7", one(per_device_eval_batch_size=7), eval_rows=24)
    yield honest("eval-10-rows-by-4", one(eval_rows=10, per_device_eval_batch_size=4), 10, eval_rows=10)
    yield honest("eval-24-rows-told", one(), options={"eval_rows": 24})
    yield honest("eval-10-rows-told", one(eval_rows=10), options={"eval_rows": 10})


def _ways() -> Iterable[Spec]:
    yield honest("best-by-loss", one(**BEST_LOSS))
    yield honest("best-by-loss-overfitted", one(**BEST_LOSS, learning_rate=3e-3), 10)
    yield honest("best-by-accuracy", one(**BEST_ACCURACY))
    yield honest("best-by-accuracy-every-10", one(**BEST_ACCURACY, learning_rate=2e-3), 10)
    yield honest("best-of-limited", one(**BEST_LOSS, learning_rate=2e-3, save_total_limit=1))
    for norm in (0.1, 100.0, 0.0):
        yield honest(f"norm-{norm:g}", one(max_grad_norm=norm))
    yield honest("lora", one(lora=True, learning_rate=5e-3))
    yield honest("lora-every-10", one(lora=True, learning_rate=2e-2), 10)
    yield honest("lora-hardly-moving", one(lora=True, learning_rate=1e-5))
    yield honest("hardly-moving", one(learning_rate=1e-7))
    yield honest("hardly-moving-every-10", one(learning_rate=1e-6), 10)
    yield honest("overfitted-little-beta", one(learning_rate=3e-3, beta=0.02, **BEST_LOSS))
    satisfied: dict[str, Any] = {"loss_type": "hinge", "beta": 1.0, "learning_rate": 3e-3, "noise": 0.0}
    yield honest("hinge-satisfied", one(**satisfied), loss="hinge")
    yield honest("hinge-satisfied-every-10", one(**satisfied), 10, loss="hinge")
    yield honest("sigmoid-satisfied", one(learning_rate=3e-3, beta=1.0, noise=0.0))
    yield honest("half-precision", one(bf16=True))
    yield honest("half-precision-every-10", one(bf16=True, learning_rate=2e-3), 10)
    yield honest("half-precision-lora", one(bf16=True, lora=True, learning_rate=2e-3))
    yield honest("checkpointed-gradients", one(gradient_checkpointing=True), 10)
    yield honest("resumed", resumed())
    yield honest("resumed-every-10", resumed(), 10)
    yield honest("resumed-between-rows", resumed(saved_at=15, interrupted_at=38), 10)
    yield honest("resumed-after-rows-were-lost", resumed(saved_at=25, interrupted_at=48))
    yield honest("stopped-early", stopped_early)
    yield honest("stopped-early-every-10", stopped_early, 10)
    yield honest("reference-precomputed", one(precompute_ref_log_probs=True))
    yield honest("reference-given", reference_given)
    yield honest("reference-synchronised", one(sync_ref_model=True, ref_model_sync_steps=20, learning_rate=1e-3))
    yield honest("reference-synchronised-every-10", one(sync_ref_model=True, ref_model_sync_steps=20), 10)
    yield honest("not-shuffled", one(train_sampling_strategy="sequential"))
    yield honest("one-epoch", one(num_train_epochs=1, rows=120, per_device_train_batch_size=2))
    yield honest("adafactor", one(optim="adafactor", learning_rate=1e-3))


def _grids() -> Iterable[Spec]:
    rates: list[dict[str, Any]] = [{"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)]
    betas: list[dict[str, Any]] = [{"beta": beta} for beta in (0.05, 0.1, 0.5)]
    both: list[dict[str, Any]] = [{"beta": beta, "learning_rate": rate} for beta in (0.1, 0.3) for rate in (3e-4, 1e-3)]
    for steps in (1, 10):
        end = "" if steps == 1 else "-every-10"
        yield honest(f"grid-rates{end}", grid(*rates), steps)
        yield honest(f"grid-betas{end}", grid(*betas), steps)
        yield honest(f"grid-both{end}", grid(*both), steps)
        yield honest(f"grid-seeds{end}", grid(*({"seed": seed} for seed in (1, 2, 3))), steps)
        yield honest(f"grid-losses{end}", grid({}, {"loss_type": "hinge"}, {"loss_type": "ipo"}), steps)
        yield honest(f"grid-lora{end}", grid(*({"lora": True, "learning_rate": rate} for rate in (5e-3, 2e-2))), steps)
        yield honest(f"grid-after-sft{end}", after_sft, steps)
        yield honest(f"grid-second-round{end}", second_round(5e-4), steps)
    yield honest("grid-second-round-far", second_round(2e-3), 10)
    yield honest("grid-second-round-new-data", second_round(1e-3, other_data=True), 1)
    yield honest("grid-betas-told", grid(*betas), options={"betas": [0.05, 0.1, 0.5]})
    yield honest("grid-both-told", grid(*both), 10, options={"betas": [0.1, 0.1, 0.3, 0.3], "eval_rows": 24})
    yield honest("grid-hardly-moving", grid({"learning_rate": 1e-7}, {"learning_rate": 2e-7}))
    yield honest("grid-schedules", grid({"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "cosine"}))


# Faults that happen in training.


def model_reused(rate: float, first_steps: int = STEPS, *, follows: bool = False) -> Callable[[Spec, Path], None]:
    """The second trial trains the first one's model on.

    Its reference is still read from the base's folder, unless it `follows`: then it is a copy of the tuned model.
    """

    def build(spec: Spec, folder: Path) -> None:
        settings: dict[str, Any] = {"logging_steps": spec.logging_steps, "learning_rate": rate}
        model = fresh()
        train(folder / "trial-1", model=model, beta=0.1, **{**settings, "max_steps": first_steps})
        reference = copy.deepcopy(model) if follows else None
        train(folder / "trial-2", model=model, beta=0.2, ref_model=reference, **settings)

    return build


def adapter_reused(spec: Spec, folder: Path) -> None:
    """The second trial is given the model with the first one's adapter, which TRL silently takes as its reference."""
    settings: dict[str, Any] = {"logging_steps": spec.logging_steps, "learning_rate": 1e-2}
    first = train(folder / "trial-1", lora=True, beta=0.1, **settings)
    train(folder / "trial-2", model=first.model, beta=0.2, **settings)


def adapter_reused_as_policy(spec: Spec, folder: Path) -> None:
    """The same, with the base given as the reference."""
    settings: dict[str, Any] = {"logging_steps": spec.logging_steps, "learning_rate": 1e-2}
    first = train(folder / "trial-1", lora=True, beta=0.1, **settings)
    train(folder / "trial-2", model=first.model, beta=0.2, ref_model=fresh(), **settings)


def wrong_reference(which: str, **more: Any) -> Callable[[Spec, Path], None]:
    """The reference is another model: `random`, or the one `after` or `before` supervised fine-tuning."""

    def build(spec: Spec, folder: Path) -> None:
        base = reference = model_folder()
        if which == "random":
            reference = model_folder(8)
        elif which == "after":
            reference = sft_base(scratch(), 5)
        else:
            base = sft_base(scratch(), 5)
        train(folder / "trial-1", base=base, ref_model=fresh(reference), logging_steps=spec.logging_steps, **more)

    return build


def optimizer_of_another(spec: Spec, folder: Path) -> None:
    """The optimizer holds the weights of a copy of the model, so that the model stays as it is."""

    def prepare(trainer: Any) -> None:
        trainer.optimizer = torch.optim.AdamW(fresh().parameters(), lr=5e-4)

    train(folder / "trial-1", prepare=prepare, logging_steps=spec.logging_steps)


def rate_drops(spec: Spec, folder: Path) -> None:
    """The learning rate is 0 from step 10 on."""

    def prepare(trainer: Any) -> None:
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: float(step < 10))

    train(folder / "trial-1", prepare=prepare, logging_steps=spec.logging_steps)


class NotANumber(DPOTrainer):
    """A trainer whose loss is not a number from step 30 on, as after an overflow."""

    def compute_loss(self, *args: Any, **more: Any) -> Any:
        loss = super().compute_loss(*args, **more)
        return loss * math.nan if self.model.training and self.state.global_step >= 30 else loss


class Stale(DPOTrainer):
    """A trainer that answers every evaluation with the first one's metrics."""

    def evaluate(self, *args: Any, **more: Any) -> Any:
        if not hasattr(self, "first_metrics"):
            self.first_metrics = super().evaluate(*args, **more)
            self.first_row = dict(self.state.log_history[-1])
            return self.first_metrics
        row = {**self.first_row, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(row)
        return self.first_metrics


def seed_ignored(spec: Spec, folder: Path) -> None:
    """Two runs under different names that are the same run, down to every digit but the times."""
    grid({}, {})(spec, folder)


TRAINED: dict[str, tuple[str, Callable[[Spec, Path], None], dict[str, Any]]] = {
    "model-reused": ("model-reused", model_reused(1e-3), {}),
    "model-reused-far": ("model-reused", model_reused(4e-3), {}),
    "model-reused-with-reference-far": ("model-reused-with-reference", model_reused(4e-3, follows=True), {}),
    "model-reused-slightly": ("model-reused", model_reused(5e-4, first_steps=20), {}),
    "model-reused-with-reference": ("model-reused-with-reference", model_reused(1e-3, follows=True), {}),
    "model-reused-with-reference-slightly": (
        "model-reused-with-reference",
        model_reused(5e-4, first_steps=20, follows=True),
        {},
    ),
    "adapter-reused": ("model-reused-with-reference", adapter_reused, {}),
    "adapter-reused-as-policy": ("model-reused", adapter_reused_as_policy, {}),
    "wrong-reference": ("wrong-reference", wrong_reference("after"), {}),
    "wrong-reference-eval-on-start": ("wrong-reference", wrong_reference("after", eval_on_start=True), {}),
    "reference-before-sft": ("wrong-reference", wrong_reference("before"), {}),
    "reference-before-sft-eval-on-start": ("wrong-reference", wrong_reference("before", eval_on_start=True), {}),
    "reference-hardly-other": ("wrong-reference", wrong_reference("random", eval_on_start=True), {}),
    "betas-swapped": ("betas-swapped", grid({"beta": 0.1}, {"beta": 0.3}), {"betas": [0.3, 0.1]}),
    "betas-swapped-far": (
        "betas-swapped",
        grid({"beta": 0.05, "learning_rate": 1e-3}, {"beta": 0.5, "learning_rate": 1e-3}),
        {"betas": [0.5, 0.05]},
    ),
    "rate-zero": ("nothing-moves", one(learning_rate=0.0), {}),
    "optimizer-of-another-model": ("nothing-moves", optimizer_of_another, {}),
    "labels-swapped": ("labels-swapped", one(swapped=True, learning_rate=1e-3), {}),
    "trained-on-evaluation": ("trained-on-evaluation", one(same_data=True, learning_rate=2e-3), {}),
    "rate-drops": ("rate-drops", rate_drops, {}),
    "saved-last": ("saved-last", one(learning_rate=3e-3, save_strategy="epoch", save_total_limit=1), {}),
    "not-a-number": ("not-a-number", one(trainer_class=NotANumber), {}),
    "not-a-number-rate": ("not-a-number", one(learning_rate=1e6, max_grad_norm=0.0), {}),
    "overfitted": ("overfitted", one(learning_rate=3e-3, rows=16, noise=0.3), {}),
    "chosen-collapses": ("chosen-collapses", one(learning_rate=4e-3, beta=0.02, loss_type="apo_down"), {}),
    "seed-ignored": ("identical", seed_ignored, {}),
    "evaluation-stale": ("evaluation-stale", one(trainer_class=Stale, learning_rate=1e-3), {}),
}


# Faults in a log: TRL's own, edited.


@functools.cache
def _clean(steps: float, trials: int, batch: int, rate: float) -> str:
    with tempfile.TemporaryDirectory(dir=model_folder().parent) as folder:
        states = []
        for number in range(trials):
            trial = Path(folder) / f"trial-{number}"
            settings: dict[str, Any] = {"learning_rate": rate * (number + 1), "logging_steps": steps}
            train(trial, data_seed=11, card=False, per_device_train_batch_size=batch, **settings)
            states.append(read(trial))
    return json.dumps(states)


def edited(change: Callable[[list[State]], None], trials: int = 1, batch: int = 4, rate: float = 5e-4) -> Any:
    """Clean logs after this change of their states."""

    def build(spec: Spec, folder: Path) -> None:
        states = json.loads(_clean(spec.logging_steps, trials, batch, rate))
        change(states)
        for number, state in enumerate(states, 1):
            write(folder / f"trial-{number}", state)

    return build


def steps_of(state: State) -> list[Row]:
    """The rows of training."""
    return [row for row in state["log_history"] if "loss" in row]


def evaluations_of(state: State) -> list[Row]:
    """The rows of evaluations."""
    return [row for row in state["log_history"] if "eval_loss" in row]


def each(rows: str, change: Callable[[Row], None], places: slice = slice(None)) -> Callable[[list[State]], None]:
    """A change of the rows of training, of evaluations, or of both (`all`)."""

    def edit(states: list[State]) -> None:
        for state in states:
            if rows in ("train", "all"):
                for row in steps_of(state)[places]:
                    change(row)
            if rows in ("eval", "all"):
                for row in evaluations_of(state)[places]:
                    change(row)

    return edit


def put(**values: Any) -> Callable[[Row], None]:
    """Set a row's metrics, in a row of an evaluation under their names there; functions get the old value."""

    def change(row: Row) -> None:
        start = "eval_" if "eval_loss" in row else ""
        for name, value in values.items():
            key = start + name.replace("__", "/")
            if key in row:
                row[key] = value(row[key]) if callable(value) else value

    return change


def negate_reference_sign(row: Row) -> None:
    """Rewards taken as beta x (reference - policy), with what follows from them."""
    start = "eval_" if "eval_loss" in row else ""
    for name in ("chosen", "rejected", "margins"):
        row[f"{start}rewards/{name}"] *= -1
    row[f"{start}rewards/accuracies"] = 1 - row[f"{start}rewards/accuracies"]


def swap_rewards(row: Row) -> None:
    """Chosen and rejected rewards in each other's columns, with the margins as they were."""
    start = "eval_" if "eval_loss" in row else ""
    one, other = f"{start}rewards/chosen", f"{start}rewards/rejected"
    row[one], row[other] = row[other], row[one]


def shuffle_epochs(states: list[State]) -> None:
    """Rows in another order, with their step numbers."""
    random.Random(3).shuffle(states[0]["log_history"])


def shuffle_evaluations(states: list[State]) -> None:
    """Evaluations' metrics in another order, under the old step numbers."""
    rows = evaluations_of(states[0])
    metrics = [{key: value for key, value in row.items() if key not in ("epoch", "step")} for row in rows]
    for row, values in zip(rows, reversed(metrics), strict=True):
        row.update(values)


def steps_backwards(states: list[State]) -> None:
    """From the middle on, steps count from the start again."""
    history = states[0]["log_history"]
    for row in history[len(history) // 2 :]:
        row["step"] -= STEPS // 2
        row["epoch"] -= 3.0


def paste_evaluation(states: list[State]) -> None:
    """The last evaluation is the one before, under its own step and epoch."""
    *_, before, last = evaluations_of(states[0])
    last |= {key: value for key, value in before.items() if key not in ("epoch", "step")}


def paste_steps(states: list[State]) -> None:
    """The second third of the training is the first one's rows again, but for rates, steps and epochs."""
    rows = steps_of(states[0])
    third = len(rows) // 3
    for source, target in zip(rows[:third], rows[third : 2 * third], strict=True):
        target |= {key: value for key, value in source.items() if key not in ("epoch", "step", "learning_rate")}


def paste_trial(states: list[State]) -> None:
    """The second trial's rows are the first one's, but for its learning rate."""
    for source, target in zip(states[0]["log_history"], states[1]["log_history"], strict=True):
        target |= {key: value for key, value in source.items() if key != "learning_rate"}


def jump(states: list[State]) -> None:
    """One row's learning rate is ten times too high."""
    steps_of(states[0])[len(steps_of(states[0])) // 2]["learning_rate"] *= 10


def rise(states: list[State]) -> None:
    """The learning rate rises again in the last third."""
    rows = steps_of(states[0])
    start = 2 * len(rows) // 3
    for number, row in enumerate(rows[start:], 1):
        row["learning_rate"] = rows[start - 1]["learning_rate"] * (1 + 0.5 * number)


def smooth(states: list[State]) -> None:
    """The loss is a running mean of itself."""
    mean = steps_of(states[0])[0]["loss"]
    for row in steps_of(states[0]):
        mean = 0.9 * mean + 0.1 * row["loss"]
        row["loss"] = mean


def deny_accuracy(states: list[State]) -> None:
    """In a few rows of training, no pair counts as right although the margin is positive."""
    rows = [row for row in steps_of(states[0]) if row["rewards/margins"] > 0.01]
    for row in rows[-5:-1]:
        row["rewards/accuracies"] = 0.0


def claim_lower(states: list[State]) -> None:
    """The best metric is lower than every evaluation's loss."""
    best = min(evaluations_of(states[0]), key=lambda row: row["eval_loss"])
    states[0]["best_metric"] = best["eval_loss"] - 0.05
    states[0]["best_global_step"] = best["step"]
    states[0]["best_model_checkpoint"] = f"trial-1/checkpoint-{best['step']}"


def other_checkpoint(states: list[State]) -> None:
    """The best checkpoint is not that of the best metric."""
    rows = sorted(evaluations_of(states[0]), key=lambda row: row["eval_loss"])
    states[0]["best_metric"] = rows[0]["eval_loss"]
    states[0]["best_global_step"] = rows[-1]["step"]
    states[0]["best_model_checkpoint"] = f"trial-1/checkpoint-{rows[-1]['step']}"


MIDDLE, FEW = slice(2, 3), slice(2, 5)
EDITED: dict[str, tuple[str, Callable[[Spec, Path], None], dict[str, Any]]] = {
    "loss-too-low": ("loss-too-low", edited(each("train", put(loss=lambda x: x / 2), FEW)), {}),
    "loss-too-low-eval": ("loss-too-low", edited(each("eval", put(loss=lambda x: x / 2), FEW)), {}),
    "loss-too-low-slightly": ("loss-too-low", edited(each("train", put(loss=lambda x: x * 0.8))), {}),
    "loss-negative": ("loss-negative", edited(each("train", put(loss=lambda x: -x), FEW)), {}),
    "loss-constant": ("loss-constant", edited(each("train", put(loss=0.6931))), {}),
    "loss-smoothed": ("loss-smoothed", edited(smooth), {}),
    "margin-one-row": ("margin", edited(each("train", put(rewards__margins=lambda x: x + 0.3), MIDDLE)), {}),
    "margin-one-evaluation": ("margin", edited(each("eval", put(rewards__margins=lambda x: x + 0.3), MIDDLE)), {}),
    "margin-everywhere": ("margin", edited(each("all", put(rewards__margins=lambda x: 2 * x))), {}),
    "accuracy-above-1": ("accuracy-range", edited(each("eval", put(rewards__accuracies=1.04), MIDDLE)), {}),
    "accuracy-below-0": ("accuracy-range", edited(each("train", put(rewards__accuracies=-0.1), MIDDLE)), {}),
    "accuracy-percent": ("accuracy-range", edited(each("all", put(rewards__accuracies=lambda x: 100 * x))), {}),
    "accuracy-0-but-margin": (
        "accuracy-against-margin",
        edited(each("eval", put(rewards__accuracies=0.0), slice(3, None)), rate=1e-3),
        {},
    ),
    "accuracy-0-but-margin-batch-1": ("accuracy-against-margin", edited(deny_accuracy, batch=1, rate=1e-3), {}),
    "accuracy-1-but-no-margin": (
        "accuracy-against-margin",
        edited(
            each(
                "eval",
                put(
                    rewards__accuracies=1.0, rewards__margins=lambda x: -x, rewards__chosen=-0.9, rewards__rejected=0.4
                ),
                MIDDLE,
            )
        ),
        {},
    ),
    "accuracy-impossible": (
        "accuracy-of-rows",
        edited(each("eval", put(rewards__accuracies=lambda x: min(x, 0.9) + 0.017))),
        {"eval_rows": 24},
    ),
    "logps-positive": ("logps-positive", edited(each("all", put(logps__chosen=abs, logps__rejected=abs))), {}),
    "logps-positive-once": ("logps-positive", edited(each("eval", put(logps__chosen=abs), MIDDLE)), {}),
    "rewards-swapped": ("rewards-sign", edited(each("all", swap_rewards), rate=1e-3), {}),
    "rewards-rejected-negated": (
        "rewards-sign",
        edited(each("all", put(rewards__rejected=lambda x: -x)), rate=1e-3),
        {},
    ),
    "rewards-of-reference": ("rewards-sign", edited(each("all", negate_reference_sign), rate=1e-3), {}),
    "rows-shuffled": ("rows-order", edited(shuffle_epochs), {}),
    "evaluations-reversed": ("evaluations-order", edited(shuffle_evaluations, rate=1e-3), {}),
    "steps-backwards": ("rows-order", edited(steps_backwards), {}),
    "evaluation-pasted": ("pasted", edited(paste_evaluation), {}),
    "steps-pasted": ("pasted", edited(paste_steps), {}),
    "trial-pasted": ("identical", edited(paste_trial, trials=2), {}),
    "rate-jumps": ("rate-schedule", edited(jump), {}),
    "rate-rises": ("rate-schedule", edited(rise), {}),
    "norm-constant": ("norm-constant", edited(each("train", put(grad_norm=1.0))), {}),
    "values-nan": ("not-a-number", edited(each("train", put(loss=math.nan), FEW)), {}),
    "values-nan-eval": ("not-a-number", edited(each("eval", put(rewards__margins=math.nan), MIDDLE)), {}),
    "best-lower-than-any": ("best-claim", edited(claim_lower), {}),
    "best-of-other-checkpoint": ("best-claim", edited(other_checkpoint, rate=2e-3), {}),
}


def _faulty() -> Iterable[Spec]:
    for name, (fault, build, options) in {**TRAINED, **EDITED}.items():
        for steps in (1, 10):
            yield Spec(f"{name}-every-{steps}", fault, steps, options, build)


HONEST: tuple[Spec, ...] = (*_losses(), *_schedules(), *_batches_and_evaluations(), *_ways(), *_grids())
FAULTY: tuple[Spec, ...] = tuple(_faulty())


def main(root: Path, part: str = "") -> None:
    """Make the runs whose names contain `part`, but for those that are there."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage, and need not look through all the libraries each time
    for group, specs in (("honest", HONEST), ("faulty", FAULTY)):
        for spec in specs:
            folder = root / group / spec.name
            if part not in f"{group}/{spec.name}" or folder.exists():
                continue
            start = time.monotonic()
            try:
                make(spec, folder)
            except Exception as error:  # noqa: BLE001 - the other runs are still wanted
                shutil.rmtree(folder, ignore_errors=True)
                print(f"{group}/{spec.name} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            print(f"{group}/{spec.name} {time.monotonic() - start:.1f} s", flush=True)


# Columns that no rule looks at, of which a recorded log is free.
UNUSED = ("logits/", "entropy", "num_tokens", "mean_token_accuracy", "total_flos")
KEPT = ("log_history", "best_metric", "best_model_checkpoint", "best_global_step", "global_step", "max_steps")


def record(root: Path, file: Path) -> None:
    """Pack all logs below `root` into one compressed JSON file: by name, each file's content by its path."""
    packed: dict[str, Any] = {}
    for group, specs in (("honest", HONEST), ("faulty", FAULTY)):
        for spec in specs:
            folder = root / group / spec.name
            files = {
                str(path.relative_to(folder)): _trimmed(json.loads(path.read_text())) for path in folder.rglob(STATE)
            }
            cards = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("README.md")}
            log = {"fault": spec.fault, "options": spec.options, "files": files | cards}
            packed[f"{group}/{spec.name}"] = log
    file.write_bytes(lzma.compress(json.dumps(packed).encode(), preset=9))


def _trimmed(state: State) -> State:
    """A state with its rows, its best checkpoint and its steps; numbers keep nine digits, as many as float32 has.

    TRL writes the checkpoint's absolute path, of which a record keeps what does not depend on the machine.
    """
    rows = [
        {
            name: float(f"{value:.9g}") if isinstance(value, float) and math.isfinite(value) else value
            for name, value in row.items()
            if not any(unused in name for unused in UNUSED)
        }
        for row in state["log_history"]
    ]
    kept = {name: state[name] for name in KEPT if name in state}
    if kept.get("best_model_checkpoint"):
        kept["best_model_checkpoint"] = str(Path(*Path(kept["best_model_checkpoint"]).parts[-2:]))
    return {**kept, "log_history": rows}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    into = sys.argv.index("--record") if "--record" in sys.argv else len(sys.argv)
    main(Path(sys.argv[1]), *sys.argv[2:into])
    if into < len(sys.argv):
        record(Path(sys.argv[1]), Path(sys.argv[into + 1]))
