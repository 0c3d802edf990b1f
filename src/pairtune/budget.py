"""What a run is expected to take before it starts, and the choices that make it fit."""

from __future__ import annotations

from rich.console import Console

from pairtune.config import RunConfig
from pairtune.cost import Cost, estimate
from pairtune.data.prepare import PreparedData
from pairtune.data.table import PairTable
from pairtune.engine.memory import fit_run, shape_of
from pairtune.engine.speed import measure_speed
from pairtune.errors import BadInput
from pairtune.footprint import remedies, usable
from pairtune.models.load import LoadedBase, blank_model, free_bytes
from pairtune.report.render_plan import does_not_fit
from pairtune.resolve_config import Resolved


def fitted(resolved: Resolved, base: LoadedBase, train: PairTable, processes: int, console: Console) -> Resolved:
    """The settings with what was chosen for the run to fit into its memory.

    Args:
        resolved: the settings.
        base: the base model, in the dtype that this machine is fastest with.
        train: the training pairs.
        processes: the number of processes that share the work.
        console: told if the run does not fit into what is free.

    Raises:
        BadInput: the run cannot fit into the memory that `--memory` allows.
    """
    config = resolved.config
    if config.engine != "pairtune" or not len(train):
        return resolved
    lengths, dtype = train.pair_lengths(), str(base.dtype).removeprefix("torch.")
    found, limit = fit_run(config, base, lengths, processes), usable(config, free_bytes(base.device))
    shape = shape_of(blank_model(base.source), base.device, processes)
    if not found.fits:
        told = does_not_fit(found, limit, remedies(config, lengths, shape, dtype, limit))
        if config.memory:
            raise BadInput(f"--memory {config.memory}: the run takes about {found.bytes / 2**30:.1f} GB, {told}")
        console.print(f"warning: about {found.bytes / 2**30:.1f} GB of memory, {told}", style="yellow", highlight=False)
    why = f"to fit --memory {config.memory}" if config.memory else f"to fit into {limit / 2**30:.1f} GB"
    chosen: dict[str, object] = {}
    if config.memory and config.method == "lora" and config.side_by_side is None:
        chosen["side_by_side"] = found.side_by_side
    if found.row_tokens < (config.row_tokens or shape.rows[0]):
        chosen["row_tokens"] = found.row_tokens
    if found.checkpointing and config.checkpointing == "auto":
        chosen["checkpointing"] = "on"
    if found.dtype != dtype:
        chosen["dtype"] = found.dtype
    return resolved.with_chosen(chosen, why)


def check_divided(config: RunConfig) -> None:
    """Refuse settings of full training that several processes, which divide its weights, do not have.

    Raises:
        BadInput: there are some.
    """
    if any(trial.optimizer == "adamw-8bit" for trial in config.trials()):
        raise BadInput("--optimizer adamw-8bit: runs in a single process; start it without the launcher, or use adamw")
    if config.method == "full" and config.eval_dtype not in (None, config.dtype):
        raise BadInput(
            f"--eval-dtype {config.eval_dtype}: with --method full, several processes divide the weights in the dtype "
            f"that they train in; omit it, or use --dtype {config.eval_dtype}"
        )


def expected(config: RunConfig, base: LoadedBase, data: PreparedData) -> Cost | None:
    """Time and memory of the run; None for TRL's engine, which is not measured."""
    if config.engine != "pairtune":
        return None
    lengths = data.train.pair_lengths()
    pairs = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
    speed = measure_speed(base.source, config.trials()[0], lengths, base.dtype, known=True)
    return estimate(config, pairs, lengths, shape_of(blank_model(base.source), base.device), speed)
