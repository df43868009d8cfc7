"""Bradley-Terry reward modelling: which of two responses people prefer."""

import torch
from jaxtyping import Float
from torch import Tensor

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
        loss = -torch.nn.functional.logsigmoid(difference)
    if center_coef:
        loss = loss + center_coef * (chosen_scores + rejected_scores) ** 2
    return loss
