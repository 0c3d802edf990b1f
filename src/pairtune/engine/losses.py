"""Preference losses: pure functions of log-probs, one value per pair, so that every mean is a mean over pairs.

All take `PairLogps` with tensors of shape [..., pairs] and return the same shape, in nats; leading dimensions are
trials side by side, each with its own `beta`. Log-ratios are policy minus reference log-probs, summed over an answer.

Unpaired losses take single answers, each desirable or undesirable: `LabelledLogps`, one value per answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pairtune.config import Loss, PairLoss, TrialConfig, UnpairedLoss


@dataclass(frozen=True)
class PairLogps:
    """The inputs of a loss for a batch of pairs.

    Attributes:
        chosen: log-probs of the chosen answers under the policy, summed over their tokens, [..., pairs].
        rejected: the same for the rejected answers.
        ref_chosen: log-probs of the chosen answers under the reference model, [pairs].
        ref_rejected: the same for the rejected answers.
        chosen_tokens: lengths of the chosen answers in tokens, [pairs].
        rejected_tokens: the same for the rejected answers.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """Log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """Log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        """Difference of the two log-ratios: the reward margin divided by beta."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def delta_per_token(self) -> Tensor:
        """The same with each log-ratio divided by its answer's length."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


@dataclass(frozen=True)
class LabelledLogps:
    """The inputs of an unpaired loss for a batch of single answers.

    Attributes:
        policy: log-probs of the answers under the policy, summed over their tokens, [..., answers].
        reference: the same under the reference model, [answers].
        desirable: whether each is a desirable answer, [answers].
        kl: the batch's estimate of the policy's KL divergence from the reference model, [...]; see `kl_estimate`.
    """

    policy: Tensor
    reference: Tensor
    desirable: Tensor
    kl: Tensor | float = 0.0

    @property
    def ratio(self) -> Tensor:
        """Log pi(answer) - log pi_ref(answer)."""
        return self.policy - self.reference


@dataclass(frozen=True)
class LossSettings:
    """Hyperparameters of the losses.

    Attributes:
        beta: strength of the pull towards the reference, one per trial in the leading dimensions, or a float.
        label_smoothing: the assumed share of swapped labels (sigmoid, robust, exo_pair).
        simpo_gamma: SimPO's target margin, as a share of beta.
        discopop_tau: DiscoPOP's temperature.
        sft_weight: weight of the chosen answer's negative log-prob per token, added to any loss of pairs.
        desirable_weight: weight of desirable answers (unpaired losses).
        undesirable_weight: weight of undesirable answers.
    """

    beta: Tensor | float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """What a trial minimises: a loss and its hyperparameters."""

    loss: Loss
    settings: LossSettings

    @classmethod
    def of(cls, trial: TrialConfig) -> Objective:
        """The objective of a trial."""
        return cls(
            trial.loss,
            LossSettings(
                beta=trial.beta,
                label_smoothing=trial.label_smoothing,
                simpo_gamma=trial.simpo_gamma,
                discopop_tau=trial.discopop_tau,
                sft_weight=trial.sft_weight,
                desirable_weight=trial.desirable_weight,
                undesirable_weight=trial.undesirable_weight,
            ),
        )


def pair_loss(name: PairLoss, pairs: PairLogps, settings: LossSettings) -> Tensor:
    """The loss called `name` for each pair, plus the SFT term if its weight is not 0.

    The SFT term is that of RPO (Pang et al. 2024, "Iterative Reasoning Preference Optimization"), per token of
    the answer.
    """
    losses = LOSSES[name](pairs, settings)
    return losses + settings.sft_weight * _nll_per_token(pairs) if settings.sft_weight else losses


def sigmoid(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); with label smoothing cDPO (Mitchell 2023, "DPO with noisy preferences")."""
    logits = settings.beta * pairs.delta
    smooth = settings.label_smoothing
    return -(1 - smooth) * logsigmoid(logits) - smooth * logsigmoid(-logits)


def robust(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Robust DPO, unbiased under swapped labels (Ray Chowdhury et al. 2024, "Provably Robust DPO")."""
    logits = settings.beta * pairs.delta
    smooth = settings.label_smoothing
    return (-(1 - smooth) * logsigmoid(logits) + smooth * logsigmoid(-logits)) / (1 - 2 * smooth)


def hinge(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """SLiC-HF's ranking loss on DPO's margin (Zhao et al. 2023; Liu et al. 2023, RSO)."""
    return torch.relu(1 - settings.beta * pairs.delta)


def ipo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17) with log-ratios per token, as its authors confirmed and TRL computes it."""
    return (pairs.delta_per_token - 1 / (2 * settings.beta)) ** 2


def sigmoid_norm(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """DPO with length-normalised log-ratios (Lambert et al. 2024, "Tulu 3")."""
    return -logsigmoid(settings.beta * pairs.delta_per_token)


def exo_pair(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """EXO for pairs (Ji et al. 2024, "Towards Efficient Exact Optimization", eq. 16); needs label smoothing > 0."""
    logits = settings.beta * pairs.delta
    smooth = settings.label_smoothing
    towards_chosen = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-smooth))
    return towards_chosen + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(smooth))


def nca_pair(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """NCA for pairs (Chen et al. 2024, "Noise Contrastive Alignment", with two answers)."""
    chosen, rejected = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def sppo_hard(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """SPPO with win probabilities of 1 and 0 (Wu et al. 2024, eq. 4.7)."""
    return (pairs.chosen_ratio - 0.5 / settings.beta) ** 2 + (pairs.rejected_ratio + 0.5 / settings.beta) ** 2


def apo_zero(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """APO-zero: chosen up, rejected down (D'Oosterlinck et al. 2024, eq. 7)."""
    beta = settings.beta
    return 1 - torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


def apo_down(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """APO-down: both down, rejected further (D'Oosterlinck et al. 2024, eq. 8)."""
    beta = settings.beta
    return torch.sigmoid(beta * pairs.chosen_ratio) + 1 - torch.sigmoid(beta * pairs.delta)


def discopop(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, eq. 5)."""
    logits = settings.beta * pairs.delta
    mix = torch.sigmoid(logits / settings.discopop_tau)
    return -logsigmoid(logits) * (1 - mix) + torch.exp(-logits) * mix


def simpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """SimPO, without a reference (Meng et al. 2024, eq. 6); the target margin is `simpo_gamma * beta`."""
    per_token = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return -logsigmoid(settings.beta * (per_token - settings.simpo_gamma))


def orpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """ORPO, without a reference (Hong et al. 2024, eq. 6 and 7); beta is the paper's lambda."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return _nll_per_token(pairs) - settings.beta * logsigmoid(log_odds)


def unpaired_loss(name: UnpairedLoss, answers: LabelledLogps, settings: LossSettings) -> Tensor:
    """The loss called `name` for each answer, times the weight of its kind; their mean is the batch's loss, as in TRL.

    Weights do not change the number that the mean is taken over.
    """
    weights = torch.where(answers.desirable, settings.desirable_weight, settings.undesirable_weight)
    return UNPAIRED_LOSSES[name](answers, settings) * weights


def kl_estimate(ratios: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference) in nats: the mean log-ratio of mismatched answers, at least 0.

    It is a constant of the loss, without a gradient (Ethayarajh et al. 2024, section 4.1).

    Args:
        ratios: log-ratios of answers given to other prompts than their own, [..., answers].

    Returns:
        [...]
    """
    return ratios.detach().mean(-1).clamp(min=0)


def kto(answers: LabelledLogps, settings: LossSettings) -> Tensor:
    """KTO (Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 7)."""
    gain = settings.beta * (answers.ratio - answers.kl)
    return 1 - torch.sigmoid(torch.where(answers.desirable, gain, -gain))


def bco(answers: LabelledLogps, settings: LossSettings) -> Tensor:
    """BCO: binary cross-entropy with the reward as logit (Jung et al. 2024, "Binary Classifier Optimization").

    Without the paper's reward shift, a running mean of rewards, as TRL 1.16 computes `bco_pair`.
    """
    reward = settings.beta * answers.ratio
    return -logsigmoid(torch.where(answers.desirable, reward, -reward))


def apo_zero_unpaired(answers: LabelledLogps, settings: LossSettings) -> Tensor:
    """APO-zero for single answers: KTO without the KL term, as TRL computes it (D'Oosterlinck et al. 2024, eq. 7)."""
    reward = settings.beta * answers.ratio
    return 1 - torch.sigmoid(torch.where(answers.desirable, reward, -reward))


def _nll_per_token(pairs: PairLogps) -> Tensor:
    return -pairs.chosen / pairs.chosen_tokens


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0."""
    return torch.log1p(-torch.exp(x))


LOSSES: dict[PairLoss, Callable[[PairLogps, LossSettings], Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "simpo": simpo,
    "orpo": orpo,
}

UNPAIRED_LOSSES: dict[UnpairedLoss, Callable[[LabelledLogps, LossSettings], Tensor]] = {
    "kto": kto,
    "bco": bco,
    "apo_zero_unpaired": apo_zero_unpaired,
}
