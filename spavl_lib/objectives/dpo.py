"""Direct preference optimisation: the loss of a pair.

The trainer uses trl's loss. This module has the paper's formula. The notebook and the tests compare
trl's loss with it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class DPOTerms(NamedTuple):
    """Loss of each pair in nats, and detached implicit rewards beta * (logp - reference logp)."""

    loss: Float[Tensor, " batch"]
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]


def dpo_loss(
    policy_chosen_logps: Float[Tensor, " batch"],
    policy_rejected_logps: Float[Tensor, " batch"],
    ref_chosen_logps: Float[Tensor, " batch"],
    ref_rejected_logps: Float[Tensor, " batch"],
    *,
    beta: float,
) -> DPOTerms:
    """Sigmoid DPO loss of each preference pair.

    Args:
        policy_chosen_logps: Summed log-probability of the chosen response under the policy, in
            nats.
        policy_rejected_logps: Summed log-probability of the rejected response under the policy, in
            nats.
        ref_chosen_logps: Summed log-probability of the chosen response under the reference, in
            nats.
        ref_rejected_logps: Summed log-probability of the rejected response under the reference, in
            nats.
        beta: Strength of the KL term, above 0, no unit. A higher value keeps the policy closer to
            the reference.

    Returns:
        One loss and two implicit rewards for each pair. The loss is not reduced.

    Raises:
        ValueError: ``beta <= 0``.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7 (sums, not means, over tokens).
    """
    if beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected)
    return DPOTerms(loss, chosen.detach(), rejected.detach())
