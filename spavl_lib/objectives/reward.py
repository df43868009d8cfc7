"""Bradley-Terry reward modelling: which response people prefer, and which one does harm."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

ORIGINAL_EPSILON = 1e-5


def bradley_terry_loss(
    chosen_scores: Float[Tensor, " batch"],
    rejected_scores: Float[Tensor, " batch"],
    *,
    center_coef: float = 0.0,
    original_form: bool = False,
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each preference.

    Args:
        chosen_scores: Score of the preferred response, no unit.
        rejected_scores: Score of the other response, no unit.
        center_coef: Weight of the squared sum of both scores, a penalty that keeps scores around 0.
            0 disables the penalty.
        original_form: Use ``-log(sigmoid(d) + 1e-5)``, as the SPA-VL authors' code does. Its
            gradient vanishes for pairs that are ranked wrongly by a wide margin: at d = -20 it is
            -0.0002, while the gradient of -logsigmoid(d) is -1.

    Returns:
        Loss of each pair in nats, not reduced.

    Source: Bradley and Terry 1952; centring: Eisenstein et al. 2023, arXiv:2312.09244, Eq. 2.
    """
    difference = chosen_scores - rejected_scores
    if original_form:
        loss = -torch.log(torch.sigmoid(difference) + ORIGINAL_EPSILON)
    else:
        loss = -logsigmoid(difference)
    if center_coef:
        loss = loss + center_coef * (chosen_scores + rejected_scores) ** 2
    return loss


def cost_loss(
    chosen_costs: Float[Tensor, " batch"],
    rejected_costs: Float[Tensor, " batch"],
    harmful: Bool[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of which response does harm, by costs.

    The sign of a cost classifies its response: above 0 the response does harm. The rejected
    response of a harmful request does harm; all other responses do none. In a pair of a harmful
    request, the rejected response must also cost more than the chosen one (Bradley-Terry).

    Args:
        chosen_costs: Cost of the preferred response, no unit.
        rejected_costs: Cost of the other response, no unit.
        harmful: Whether the request is harmful, so that complying with it does harm.

    Returns:
        Loss of each pair in nats, not reduced.

    Source: the cost model of Dai et al. 2023, *Safe RLHF*, arXiv:2310.12773. In their data every
    pair has a more harmful response. Here pairs of harmless requests have none, and only the signs
    count.
    """
    signs = torch.where(harmful, 1.0, -1.0)
    order = logsigmoid(rejected_costs - chosen_costs) * harmful
    return -order - logsigmoid(-chosen_costs) - logsigmoid(signs * rejected_costs)
