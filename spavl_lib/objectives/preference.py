"""Losses on pairs that trl does not have with images: cDPO, SimPO and ORPO.

Each gives the loss of each pair in nats, not reduced. The last two need no reference model. The
trainer computes cDPO as a sum of two of trl's losses, and the tests compare the sum with
`cdpo_loss`.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

Pairs = Float[Tensor, " batch"]
# A mean log-probability of exactly 0 would have infinite odds.
_HIGHEST = -1e-6


def cdpo_loss(margins: Pairs, *, label_smoothing: float) -> Pairs:
    """DPO's loss if a share of the preferences is wrong.

    Args:
        margins: Implicit reward of the chosen response minus that of the rejected one, which is
            beta times the difference of their log-ratios to the reference.
        label_smoothing: Assumed share of wrong preferences, in [0, 0.5).

    Source: Mitchell 2023, *A note on DPO with noisy preferences and relationship to IPO*, Eq. 3.
    """
    right = (1 - label_smoothing) * logsigmoid(margins)
    return -right - label_smoothing * logsigmoid(-margins)


def simpo_loss(chosen_means: Pairs, rejected_means: Pairs, *, beta: float, margin: float) -> Pairs:
    """SimPO: the mean log-probability of a token is the reward, and it must win by a margin.

    Args:
        chosen_means: Mean log-probability of the tokens of the chosen response, in nats.
        rejected_means: The same of the rejected response.
        beta: Scale of the rewards, no unit.
        margin: By how much the chosen response's reward must be higher (the paper's gamma).

    Source: Meng et al. 2024, *SimPO*, arXiv 2405.14734, Eq. 6.
    """
    return -logsigmoid(beta * (chosen_means - rejected_means) - margin)


def orpo_loss(chosen_means: Pairs, rejected_means: Pairs) -> Pairs:
    """ORPO's term for the ratio of the odds, to be added to the cross-entropy `sft`.

    Args:
        chosen_means: Mean log-probability of the tokens of the chosen response, in nats.
        rejected_means: The same of the rejected response.

    Source: Hong et al. 2024, *ORPO*, arXiv 2403.07691, Eq. 4 and 7.
    """
    return -logsigmoid(_log_odds(chosen_means) - _log_odds(rejected_means))


def _log_odds(logps: Pairs) -> Pairs:
    logps = logps.clamp(max=_HIGHEST)
    return logps - torch.log(-torch.expm1(logps))
