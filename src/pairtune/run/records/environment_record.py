"""environment.json: what a run was made with."""

from __future__ import annotations

from pairtune.run.records.base import Part, Record


class Machine(Part):
    """The hardware and system of a machine.

    Attributes:
        system: operating system and architecture.
        processor: name of the processor.
        instructions: instruction sets that decide which kernels are used; empty if the system does not report them.
        cores: cores that a process may use, considering a container's limit.
        memory_gb: total memory, or the container's limit.
        memory_free_gb: free memory when it was measured; None if not recorded.
        limits: environment settings that affect the results or the speed.
        device: the accelerator's name, or "cpu".
    """

    system: str = ""
    processor: str
    instructions: list[str] = []
    cores: float
    memory_gb: float
    memory_free_gb: float | None = None
    limits: dict[str, str] = {}
    device: str = "cpu"


class BaseModelRecord(Part):
    """The model that a run started from: the name that the user typed, and its Hub id and commit if it has them."""

    name: str
    hub_id: str | None = None
    revision: str | None = None
    license: str | None = None


class KernelChoice(Part):
    """How matrix products of one dtype are computed on a machine, and what was measured; see `engine.kernels`.

    Attributes:
        tile: rows per tile; None if products are not tiled.
        least: minimum number of rows of a product.
        by_trial: whether batched products are computed trial by trial.
        exact: whether the bits of a row do not depend on the other rows.
        differing: row counts for which products have different bits than products with many rows.
        bits: a fingerprint of the results of the chosen products.
        seconds: the time that the measurement took.
    """

    tile: int | None = None
    least: int = 1
    by_trial: bool = False
    exact: bool = False
    differing: list[int] = []
    bits: str
    seconds: float = 0.0


class MachineChoices(Part):
    """What was chosen for a run on its machine; later steps of the run use the same choices.

    Attributes:
        dtype: dtype of the base weights, or of matrix products in full fine-tuning; None if not recorded.
        threads: number of PyTorch threads on a CPU.
        side_by_side: number of trials trained at once.
        nodes: number of tasks at once, on a cluster.
        row_tokens: tokens of a row in training, if memory ran out with longer ones.
        kernels: the kernel choice for each dtype.
    """

    dtype: str | None = None
    threads: int | None = None
    side_by_side: int | None = None
    nodes: int | None = None
    row_tokens: int | None = None
    kernels: dict[str, KernelChoice] = {}


class Environment(Record):
    """The environment in which a run was made."""

    file = "environment.json"

    started: str
    versions: dict[str, str]
    machine: Machine
    base: BaseModelRecord
    choices: MachineChoices = MachineChoices()
