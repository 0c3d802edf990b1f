"""How much memory a run takes, by part, and what makes it fit into less.

Pure arithmetic from a model's shape and its pairs' lengths. The formulas count what the engine keeps;
`benchmarks/plan.py` compares them with what runs take.
"""

from __future__ import annotations

from collections.abc import Iterator

from pairtune.config import RunConfig, TrialConfig
from pairtune.run.records import Part

# Tokens of a row of each trial in training; see `engine.policy`.
ROW_TOKENS = 512
# Tokens of a row in evaluation, for all trials together.
EVALUATION_ROW = 4096
ACCELERATOR_EVALUATION_ROW = 16_384
# Longest pair, in tokens, for dense attention, whose memory grows with the square of the length.
DENSE_TOKENS = 640
# Logits that are computed at once: 32 MB in float32, small enough to stay in the CPU's cache.
CHUNK_LOGITS = 8 << 20
# The same on accelerators, which are only busy with more: 256 MB, and rows as long as memory allows.
ACCELERATOR_LOGITS = 64 << 20
ACCELERATOR_ROWS = (8192, 4096, 2048, 1024, ROW_TOKENS)
# The most trials at once: beyond, they take memory and gain little. Few saturate a CPU, more an accelerator.
MOST_TRIALS, ACCELERATOR_TRIALS = 4, 8
# Answers at once, beyond which products of a pass gain little, and the tokens after which one is cut off.
ANSWERS_AT_ONCE, ANSWER_TOKENS = 32, 160
NUMBER_SIZES = {"float32": 4, "bfloat16": 2}
# The share of the free memory that a run plans with; the rest is for other programs and what is not counted here.
USABLE = 0.7

# Of each trained weight: itself, its gradient and AdamW's two moments, all float32.
_BYTES_PER_WEIGHT = 16
# Python, PyTorch, transformers and PEFT, the tokenizer, and what allocators keep.
_PROGRAM_BYTES = 550e6
# Larger than what tensors hold: freed memory that cannot be given back.
_HOLES = 1.05
# Linear layers of a decoder layer.
_PROJECTIONS = 7
# Settings of trials that memory grows with.
_SIZES = ("lora_rank", "batch_size")


class ModelShape(Part):
    """The sizes of a model.

    Attributes:
        parameters: all of them, the embeddings included.
        layers: decoder layers.
        hidden: size of the hidden states.
        inner: inputs of the last linear layer of an MLP.
        heads: query heads.
        queries: size of all query heads together.
        keys: size of all key heads together.
        adapter_weights: weights of an adapter of rank 1 on every linear layer.
        vocabulary: words of the output embedding.
        packed: whether pairs share rows; otherwise each answer has a padded row with its own copy of the prompt.
        fused: whether the engine has its own implementation of the layers, which keeps less for the backward pass.
        accelerator: whether it is computed on one: in longer rows, and without keeping attention weights.
        four_bit: how many of the parameters are stored in 4 bits.
        linear: how many could be, being in linear layers.
        in_layers: how many of the parameters are in decoder layers.
        processes: among how many processes full training divides its weights.
    """

    parameters: int
    layers: int
    hidden: int
    inner: int
    heads: int
    queries: int
    keys: int
    adapter_weights: int
    vocabulary: int
    packed: bool = True
    fused: bool = True
    accelerator: bool = False
    four_bit: int = 0
    linear: int = 0
    in_layers: int = 0
    processes: int = 1

    def weights(self, number_size: int, four_bit: int) -> float:
        """Bytes of all weights.

        Args:
            number_size: bytes of one that is not in 4 bits.
            four_bit: how many are in 4 bits, with a scale for 64 of them.
        """
        return float((self.parameters - four_bit) * number_size + four_bit * (0.5 + number_size / 64))

    @property
    def rows(self) -> tuple[int, ...]:
        """Tokens of a trial's row in training, from the fastest to the smallest."""
        return ACCELERATOR_ROWS if self.accelerator else (ROW_TOKENS,)

    @property
    def most_trials(self) -> int:
        """The most trials that are trained side by side."""
        return ACCELERATOR_TRIALS if self.accelerator else MOST_TRIALS

    @property
    def evaluation_row(self) -> int:
        """Tokens of a row in evaluation, for all trials together."""
        return ACCELERATOR_EVALUATION_ROW if self.accelerator else EVALUATION_ROW

    @property
    def logits(self) -> int:
        """Logits that are computed at once."""
        return ACCELERATOR_LOGITS if self.accelerator else CHUNK_LOGITS


class PairLengths(Part):
    """What the pairs are like: mean tokens of their parts, and the tokens of the longest pair."""

    prompt: float
    chosen: float
    rejected: float
    longest: int

    @property
    def answers(self) -> float:
        """Mean tokens of both answers together."""
        return self.chosen + self.rejected

    @property
    def whole(self) -> float:
        """Mean tokens of a pair, whose prompt is computed once."""
        return self.prompt + self.answers

    @classmethod
    def full(cls, tokens: int) -> PairLengths:
        """Pairs of one length, where none are known: half of it the prompt, and a quarter each answer."""
        return cls(prompt=tokens / 2, chosen=tokens / 4, rejected=tokens / 4, longest=tokens)


def of_single_answers(prompt: float, answer: float) -> dict[str, float]:
    """Mean lengths of single answers, as if they were pairs that take the same time.

    A single answer costs no second one, but its mismatched answer is scored without gradients, with the prompt: a third
    of what the same tokens cost in training.
    """
    return {"prompt": prompt, "chosen": answer, "rejected": (prompt + answer) / 3}


class Fit(Part):
    """How a run is made to fit: the choices that depend on memory.

    Attributes:
        dtype: dtype of the base weights.
        side_by_side: trials at once.
        row_tokens: tokens of a row of each trial.
        checkpointing: whether layers keep only their inputs.
        memory: bytes by part, at the peak.
        fits: whether that is at most what may be used.
    """

    dtype: str
    side_by_side: int
    row_tokens: int
    checkpointing: bool
    memory: dict[str, float]
    fits: bool

    @property
    def bytes(self) -> float:
        """All parts together."""
        return sum(self.memory.values())


def usable(config: RunConfig, free: float) -> float:
    """The bytes that a run may take: those that `--memory` allows, or a share of what is free."""
    return float(config.memory_bytes or USABLE * free)


def fit(config: RunConfig, lengths: PairLengths, shape: ModelShape, dtype: str, limit: float) -> Fit:
    """The fastest way of a run that fits: fewer trials side by side, then shorter rows, checkpointing, and bfloat16.

    What the settings name is kept. If nothing fits, it is the way that takes the least.

    Args:
        config: the settings.
        lengths: what the pairs are like.
        shape: the model.
        dtype: dtype of the base weights that this machine is fastest with.
        limit: the bytes that may be used.
    """
    found = None
    for own, width, row, checkpointing in _ways(config, lengths, shape, dtype):
        size = NUMBER_SIZES[own]
        memory = peak_memory(config, shape, size, lengths, width=width, row_tokens=row, checkpointing=checkpointing)
        found = Fit(
            dtype=own,
            side_by_side=width,
            row_tokens=row,
            checkpointing=checkpointing,
            memory=memory,
            fits=sum(memory.values()) <= limit,
        )
        if found.fits:
            break
    assert found is not None  # noqa: S101 - there is always one way
    return found


def _ways(
    config: RunConfig, lengths: PairLengths, shape: ModelShape, dtype: str
) -> Iterator[tuple[str, int, int, bool]]:
    """Dtype, trials side by side, tokens of a row, and checkpointing, from fast to small."""
    trials = config.trial_count or len(config.trials())
    widths = [config.side_by_side] if config.side_by_side else range(min(trials, shape.most_trials), 0, -1)
    if config.method == "full":
        widths = [1]
    rows = (config.row_tokens,) if config.row_tokens else shape.rows
    shorter = [] if config.row_tokens or lengths.longest >= rows[-1] else [lengths.longest]
    smaller = ["bfloat16"] if config.dtype == "auto" and config.method == "lora" and dtype == "float32" else []
    for own in (dtype, *smaller):
        for checkpointing in {"auto": (False, True), "on": (True,), "off": (False,)}[config.checkpointing]:
            for width in widths:
                for row in rows:
                    yield own, width, row, checkpointing
            for row in shorter:
                yield own, widths[-1], row, checkpointing


def longest_that_fits(config: RunConfig, lengths: PairLengths, shape: ModelShape, dtype: str, limit: float) -> int:
    """Tokens of the longest pair that would fit; 0: not even short ones would."""
    low, high = 0, lengths.longest
    while high - low > 1:
        tokens = (low + high) // 2
        shorter = lengths.model_copy(update={"longest": tokens})
        low, high = (tokens, high) if fit(config, shorter, shape, dtype, limit).fits else (low, tokens)
    return low if low >= 16 else 0


def remedies(config: RunConfig, lengths: PairLengths, shape: ModelShape, dtype: str, limit: float) -> tuple[str, ...]:
    """What would make a run fit that does not, each for itself, in words."""
    found = []
    if longest := longest_that_fits(config, lengths, shape, dtype, limit):
        found.append(f"pairs of up to {longest:,} tokens (lower --max-length)")
    compact = config.instead(optimizer="adamw-8bit")
    adapters = config.instead(optimizer="adamw", method="lora")
    full = config.method == "full"
    divisible = full and shape.accelerator and shape.processes == 1 and not config.eval_dtype
    for processes in (2, 4, 8, 16) if divisible else ():
        divided = shape.model_copy(update={"processes": processes})
        if fit(config, lengths, divided, dtype, limit).fits:
            with_adamw = " with --optimizer adamw" if config.optimizer == "adamw-8bit" else ""
            found.append(f"{processes} such GPUs{with_adamw} (torchrun --nproc-per-node {processes})")
            break
    if full and shape.processes == 1 and fit(compact, lengths, shape, dtype, limit).fits:
        found.append("--optimizer adamw-8bit")
    if full and fit(adapters, lengths, shape, dtype, limit).fits:
        found.append("--method lora")
    in_four_bits = shape.model_copy(update={"four_bit": shape.linear})
    if not found and shape.linear > shape.four_bit and fit(adapters, lengths, in_four_bits, dtype, limit).fits:
        found.append("--model NAME@nf4, a base in 4 bits" + (", with --method lora" if full else ""))
    return tuple(found)


def peak_memory(
    config: RunConfig,
    shape: ModelShape,
    number_size: int,
    lengths: PairLengths,
    *,
    width: int,
    row_tokens: int,
    checkpointing: bool,
) -> dict[str, float]:
    """Bytes of each of a run's processes by part, in the stage that takes the most.

    That is training, answering held-out prompts, or with divided weights one of those of `_divided_memory`.
    """
    point = {name: max(given) if name in _SIZES else given[0] for name, given in config.dimensions.items()}
    trial = config.trial(**point)
    training = training_memory(
        shape,
        trial,
        number_size,
        lengths,
        width=width,
        row_tokens=row_tokens,
        checkpointing=checkpointing,
    )
    answering = _answering_memory(trial, config, shape, number_size, lengths) if config.samples != 0 else {}
    divided = _divided_memory(shape, number_size) if trial.method == "full" and shape.processes > 1 else []
    largest = max(training, answering, *divided, key=lambda parts: sum(parts.values()))
    return largest | {"program": _PROGRAM_BYTES}


def training_memory(
    shape: ModelShape,
    trial: TrialConfig,
    number_size: int,
    lengths: PairLengths,
    *,
    width: int,
    row_tokens: int = ROW_TOKENS,
    checkpointing: bool = False,
) -> dict[str, float]:
    """Bytes of trials in training by part, without the program itself.

    Args:
        shape: the model.
        trial: any of the trials, for its method, adapter and batch.
        number_size: bytes of one number of the base.
        lengths: what the pairs are like.
        width: number of trials side by side.
        row_tokens: tokens of a row of each trial; a longer pair has a row of its own.
        checkpointing: whether layers keep only their inputs.
    """
    longest = lengths.longest
    row = max(longest, min(row_tokens, trial.batch_size * longest))
    tokens = float(width) * row
    if not shape.packed:
        tokens *= 1 + lengths.prompt / max(1.0, lengths.whole)  # each answer has its own copy of the prompt
    # Pairs attend to themselves alone: the longest ones, and a shorter one that fills the row.
    rest = row % max(1, longest)
    attending = row - rest + rest * rest / max(1, longest)
    scores = shape.heads * width * attending * _scores(lengths, shape)
    rank = 0 if trial.method == "full" else trial.lora_rank
    layer = tokens * _kept(shape, rank) + scores
    kept = shape.layers * tokens * shape.hidden + layer if checkpointing else shape.layers * layer
    # The backward pass of one layer: gradients of what it kept, and what is repeated for them.
    passing = tokens * (6 * shape.inner + 4 * shape.hidden + 3 * shape.queries) + 2 * scores
    words = min(tokens, shape.logits // shape.vocabulary) * shape.vocabulary
    head = words * (number_size + 4)
    evaluating = _evaluating(shape, number_size) + head
    parts = {"weights": shape.weights(number_size, shape.four_bit)}
    if trial.method == "full" and shape.processes > 1:
        # Of each share the float32 weight, its gradient and both moments. Embeddings and head are whole meanwhile, and
        # so are two layers; their gradients are, too, before they are added up in float32.
        layer = shape.in_layers / shape.layers
        outside = shape.parameters - shape.in_layers
        held = (outside + 2 * layer + shape.vocabulary * shape.hidden) * number_size  # the reference's head, too
        parts["weights"] = 4 * shape.parameters / shape.processes + held
        gathered = (outside + layer) * number_size + 4 * max(outside, layer) + 4 * shape.vocabulary * shape.hidden
        parts["gradients and optimizer"] = 12 * shape.parameters / shape.processes + gathered
    elif trial.method == "full" and trial.optimizer == "adamw-8bit":
        # Moments of 8 bits with their scales, what masters have beyond the weights, and the gradients: of a step's only
        # row as they come, of several rows their sum in float32; the output embedding's is in float32 besides.
        several = trial.batch_size * lengths.longest > row_tokens
        masters = 2 if number_size < 4 else 0
        gradients = (
            4 + number_size if several else number_size
        ) * shape.parameters + 4 * shape.vocabulary * shape.hidden
        parts["gradients and optimizer"] = (2 + 8 / 256 + masters) * shape.parameters + gradients
    elif trial.method == "full":
        masters = 4 if number_size < 4 else 0
        # The row's own gradients next to the sums, the output embedding's in float32 besides.
        gradients = 4 * shape.parameters + number_size * shape.parameters + 4 * shape.vocabulary * shape.hidden
        parts["gradients and optimizer"] = float((8 + masters) * shape.parameters + gradients)
    else:
        own = _BYTES_PER_WEIGHT + (number_size if number_size < 4 else 0)  # the factors in the base's type
        parts["adapters and optimizer"] = float(width * rank * shape.adapter_weights * own)
    parts["activations"] = _HOLES * max((kept + passing) * number_size + head, evaluating)
    return parts


def _evaluating(shape: ModelShape, number_size: int) -> float:
    """Bytes of what one layer computes of a row in evaluation."""
    return float(shape.evaluation_row * (4 * shape.inner + 6 * shape.hidden) * number_size)


def _divided_memory(shape: ModelShape, number_size: int) -> list[dict[str, float]]:
    """Bytes of the stages in which something is whole beside a process's share of the weights.

    These are the reference pass, with a model of its own, and on a CPU the checkpoint that the first process gathers:
    weights and both moments. On an accelerator, that is in the memory of its host.
    """
    words = min(shape.evaluation_row, shape.logits // shape.vocabulary) * shape.vocabulary
    share = 4 * shape.parameters / shape.processes
    reference = {
        "weights": share + shape.weights(number_size, 0),
        "activations": _HOLES * (_evaluating(shape, number_size) + words * (number_size + 4)),
    }
    if shape.accelerator:
        return [reference]
    return [
        reference,
        {
            "weights": share + shape.vocabulary * shape.hidden * number_size,
            "gradients and optimizer": 2 * share,
            "checkpoint": 12.0 * shape.parameters,
        },
    ]


def _kept(shape: ModelShape, rank: int) -> float:
    """Numbers that a decoder layer keeps of each token for its backward pass, attention weights aside."""
    inners = _PROJECTIONS * rank
    if shape.fused:  # both halves' inputs; queries, keys, values and what attention mixes of them; gate and up
        return 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 2 * shape.inner + inners
    # Those of transformers also keep both norms' results, rotated and unrotated heads, and each step of the MLP.
    return 6 * shape.hidden + 4 * shape.queries + 4 * shape.keys + 5 * shape.inner + inners


def _scores(lengths: PairLengths, shape: ModelShape) -> float:
    """Attention weights that a head keeps of each token of the longest pair; long pairs keep none."""
    longest = lengths.longest
    if longest > DENSE_TOKENS or not shape.packed or shape.accelerator:
        return 0.0
    prompt, chosen, rejected = (
        longest * part / max(1.0, lengths.whole) for part in (lengths.prompt, lengths.chosen, lengths.rejected)
    )
    # The prompt attends to itself, each answer to the prompt and itself.
    return (prompt**2 + chosen * (prompt + chosen) + rejected * (prompt + rejected)) / max(1, longest)


def _answering_memory(
    trial: TrialConfig, config: RunConfig, shape: ModelShape, number_size: int, lengths: PairLengths
) -> dict[str, float]:
    """Bytes while held-out prompts are answered: the base, as many adapters as train at once, and the KV cache."""
    models = 1 + min(shape.most_trials, config.trial_count or len(config.trials()))
    questions = min(ANSWERS_AT_ONCE, models * (config.samples or ANSWERS_AT_ONCE))
    longest = min(lengths.longest, config.max_length) + ANSWER_TOKENS
    cache = questions * longest * shape.layers * 2 * shape.keys * number_size
    adapters = (models - 1) * trial.lora_rank * shape.adapter_weights * number_size
    if config.method == "full":
        adapters = 0
    return {
        # On a CPU answers are given with whole weights: unpacking them at every token would take longer than the rest.
        "weights": shape.weights(number_size, shape.four_bit if shape.accelerator else 0),
        "adapters": float(adapters),
        "KV cache": float(cache),
        "logits": float(3 * questions * shape.vocabulary * 4),
    }
