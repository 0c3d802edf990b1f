"""Settings of a TRL script as settings of a run, and what is different here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pairtune.config import PairLoss, Track
from pairtune.errors import BadInput
from pairtune.shown import Shown

if TYPE_CHECKING:
    from rich.console import RenderableType

_SAME = "the same"
# TRL's defaults (1.16) of the fields that are read here, for a mapping that does not name them.
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "beta": 0.1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "max_length": 1024,
    "max_grad_norm": 1.0,
    "label_smoothing": 0.0,
    "discopop_tau": 0.05,
    "seed": 42,
    "gradient_checkpointing": True,
}
# Fields that change what is trained and have no counterpart, with the values that mean they are not used.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "max_steps": (-1,),
    "f_divergence_type": ("reverse_kl", "FDivergenceType.REVERSE_KL"),
    "use_weighting": (False,),
    "ld_alpha": (None,),
    "sync_ref_model": (False,),
    "neftune_noise_alpha": (None,),
    "weight_decay": (0.0,),
    "adam_beta1": (0.9,),
    "adam_beta2": (0.999,),
    "adam_epsilon": (1e-8,),
    "lr_scheduler_type": ("linear", "SchedulerType.LINEAR"),
    "warmup_steps": (0,),
    "warmup_ratio": (0.0, None),
    "router_aux_loss_coef": (None, 0.0),
    "trust_remote_code": (False,),
}
# Fields that change nothing here, and why.
_NOT_NEEDED: dict[str, str] = {
    "eval_strategy": "every trial is evaluated after every epoch",
    "save_strategy": "the best epoch is kept, and a checkpoint every checkpoint_steps",
    "load_best_model_at_end": "the best epoch of the best trial is always what is kept",
    "metric_for_best_model": "the setting select decides: eval_loss, accuracy, margin or fewer_faults",
    "logging_steps": "every optimizer step is logged",
    "precompute_ref_log_probs": "always: the reference's log-probs are computed once for all trials",
    "padding_free": "always: pairs are packed into rows",
    "use_liger_kernel": "the head is always computed in chunks",
    "truncation_mode": "a prompt that is too long loses its oldest turns; answers are never cut",
    "per_device_eval_batch_size": "metrics are means over pairs and do not depend on batches",
    "disable_dropout": "there is none but lora_dropout",
    "dataset_num_proc": "pairs are tokenized as they are read",
}


@dataclass(frozen=True, repr=False)
class TrlSettings(Shown, Mapping[str, Any]):
    """Settings for `tune`, of a TRL script: `pairtune.tune("pairs.jsonl", **pairtune.from_trl(args, lora))`.

    Attributes:
        settings: settings of `tune` by name.
        told: by field of TRL, its value and what became of it.
    """

    settings: Mapping[str, Any]
    told: Mapping[str, tuple[str, str]]

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    def rendered(self) -> RenderableType:
        """A table of TRL's fields, and what became of each."""
        from rich.table import Table

        table = Table("TRL", "value", "here")
        for name, (value, here) in self.told.items():
            table.add_row(name, value, here)
        return table


def from_trl(args: Any, peft_config: Any = None) -> TrlSettings:
    """Take over the settings of a TRL script.

    Examples:
        >>> settings = pairtune.from_trl(DPOConfig(learning_rate=5e-6, beta=0.2), LoraConfig(r=8))  # doctest: +SKIP
        >>> settings  # shows what is different here  # doctest: +SKIP
        >>> pairtune.tune("pairs.jsonl", model="Qwen/Qwen2-0.5B-Instruct", **settings)  # doctest: +SKIP

    Args:
        args: a `DPOConfig`, or its fields in a mapping.
        peft_config: the `LoraConfig` that the trainer got, or its fields; None: all weights are trained, as in TRL.

    Raises:
        BadInput: a field changes what is trained and has no counterpart, or has a value that is not known here.
    """
    given = _fields(args, "args")
    adapter = None if peft_config is None else _fields(peft_config, "peft_config")
    reader = _Reader(_DEFAULTS | given, set(given) if isinstance(args, Mapping) else _changed(args))
    for name, values in _UNSUPPORTED.items():
        value = given.get(name, values[0])
        if value not in values and str(value) not in values:
            raise BadInput(
                f"{name}: {value!r} changes what is trained, and has no counterpart here (only {values[0]!r}); "
                "use TRL for it, or drop it"
            )
    reader.take("learning_rate", lambda value: {"learning_rate": [float(value)]})
    reader.take("beta", lambda value: {"beta": [float(value)]})
    reader.take("num_train_epochs", lambda value: {"epochs": _whole("num_train_epochs", value)})
    reader.batch()
    reader.loss()
    for name in ("label_smoothing", "discopop_tau", "max_grad_norm", "seed", "max_length"):
        reader.take(name, partial(_named, name))
    reader.take("gradient_checkpointing", lambda value: {"checkpointing": "auto" if value else "off"})
    reader.precision()
    reader.take("optim", partial(_optimizer, adapter is None))
    reader.take("report_to", _trackers)
    reader.take("output_dir", lambda value: {"out": Path(value)} if value else {})
    if given.get("push_to_hub"):
        if not given.get("hub_model_id"):
            raise BadInput("push_to_hub: needs hub_model_id, the repository's name (USER/NAME)")
        reader.take("hub_model_id", lambda value: {"push": value})
    reader.rest()
    return TrlSettings({**reader.settings, **_adapter(adapter)}, reader.told | _told_of_adapter(adapter))


class _Reader:
    """TRL's fields, taken one by one."""

    def __init__(self, values: Mapping[str, Any], said: set[str]) -> None:
        self.values, self.said = values, said
        self.settings: dict[str, Any] = {}
        self.told: dict[str, tuple[str, str]] = {}

    def take(self, name: str, settings: Callable[[Any], dict[str, Any]]) -> None:
        if name not in self.values:
            return
        found = settings(self.values[name])
        self.settings |= found
        if name in self.said or name in _DEFAULTS:
            self.told[name] = (
                str(self.values[name]),
                ", ".join(f"{key}: {_shown(value)}" for key, value in found.items()),
            )

    def batch(self) -> None:
        """The pairs of an optimizer step; TRL has them by device and accumulation."""
        parts = [int(self.values[name]) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
        self.settings["batch_size"] = parts[0] * parts[1]
        said = f"batch_size: {parts[0] * parts[1]}, pairs per optimizer step over all devices"
        self.told["per_device_train_batch_size"] = (f"{parts[0]} x {parts[1]} accumulated", said)

    def loss(self) -> None:
        """The loss, alone or with TRL's SFT term."""
        kinds = self.values.get("loss_type", "sigmoid")
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        weights = list(self.values.get("loss_weights") or [1.0] * len(kinds))
        terms = dict(zip(kinds, weights, strict=True)) if len(kinds) == len(weights) else {}
        sft = terms.pop("sft", 0.0)
        known = get_args(PairLoss)
        if len(terms) != 1 or not set(terms) <= set(known) or next(iter(terms.values())) != 1:
            raise BadInput(
                f"loss_type: {kinds} with loss_weights {weights} has no counterpart here; should be one of "
                f"{', '.join(known)}, with weight 1, and may have sft beside it"
            )
        self.settings |= {"loss": next(iter(terms))} | ({"sft_weight": sft} if sft else {})
        if {"loss_type", "loss_weights"} & self.said:
            said = f"loss: {next(iter(terms))}" + (f", sft_weight: {sft:g}" if sft else "")
            self.told["loss_type"] = (str(kinds), said)

    def precision(self) -> None:
        """The data type of the base weights."""
        if self.values.get("fp16"):
            raise BadInput("fp16: has no counterpart here; use bf16, or neither")
        if self.values.get("bf16"):  # TRL's own default
            here = "dtype: auto, bfloat16 where this machine is faster in it; adapters, optimizer and losses in float32"
            self.told["bf16"] = ("True", here)

    def rest(self) -> None:
        """Say what is not needed, and which fields are not looked at."""
        for name in sorted(self.said - self.told.keys() - _UNSUPPORTED.keys()):
            if name in ("gradient_accumulation_steps", "loss_weights", "fp16", "bf16", "push_to_hub", "hub_model_id"):
                continue
            self.told[name] = (_shown(self.values[name]), _NOT_NEEDED.get(name, "not looked at"))


def _fields(config: Any, name: str) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: getattr(config, field.name) for field in fields(config)}
    raise BadInput(
        f"{name}: should be a config of TRL or PEFT, or a mapping of its fields, not {type(config).__name__}"
    )


def _changed(config: Any) -> set[str]:
    """The fields of a dataclass that do not have their defaults."""
    return {
        field.name
        for field in fields(config)
        if field.default is not MISSING and getattr(config, field.name) != field.default
    }


def _named(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {name: value}


def _optimizer(full: bool, value: Any) -> dict[str, Any]:
    name = str(getattr(value, "value", value))
    if "adamw" not in name:
        raise BadInput(f"optim: {name} changes what is trained, and has no counterpart here; use adamw_torch")
    return {"optimizer": "adamw-8bit" if full and "8bit" in name else "adamw"}


def _whole(name: str, value: float) -> int:
    if value != int(value) or value < 1:
        raise BadInput(
            f"{name}: should be a whole number of epochs, since trials are evaluated after each, not {value:g}"
        )
    return int(value)


def _trackers(value: Any) -> dict[str, Any]:
    names = [value] if isinstance(value, str) else list(value or [])
    names = [name for name in names if name not in ("none", "all")]
    for name in names:
        if name not in get_args(Track):
            raise BadInput(f"report_to: {name} has no counterpart here; should be of {', '.join(get_args(Track))}")
    return {"track": names} if names else {}


def _adapter(given: dict[str, Any] | None) -> dict[str, Any]:
    if given is None:
        return {"method": "full"}
    if given.get("use_dora") or given.get("rank_pattern") or given.get("alpha_pattern"):
        raise BadInput("peft_config: DoRA, and ranks or alphas by layer, cannot be trained here; use plain LoRA")
    if given.get("bias", "none") != "none" or given.get("modules_to_save"):
        raise BadInput(
            "peft_config: bias and modules_to_save have no counterpart here; adapters are all that is trained"
        )
    targets = given.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        raise BadInput(
            f"peft_config: target_modules should be names of layers or all-linear, not the pattern {targets!r}"
        )
    settings = {
        "method": "lora",
        "lora_rank": given.get("r", 8),
        "lora_alpha": given.get("lora_alpha", 8),
        "lora_dropout": given.get("lora_dropout", 0.0),
        "rslora": bool(given.get("use_rslora", False)),
    }
    if targets and not isinstance(targets, str):
        settings["lora_targets"] = sorted(targets)
    return settings


def _told_of_adapter(given: dict[str, Any] | None) -> dict[str, tuple[str, str]]:
    if given is None:
        return {"peft_config": ("None", "method: full, all weights are trained")}
    told = {name: (_shown(value), _SAME) for name, value in _adapter(given).items() if name != "method"}
    if not given.get("target_modules"):
        told["target_modules"] = (
            "None",
            "every linear layer but the output; PEFT takes the attention's q and v for most",
        )
    return told


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
