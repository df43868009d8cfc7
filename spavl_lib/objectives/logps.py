"""Log-probabilities of each token, and summed over a response."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_logps(
    logits: Float[Tensor, "batch seq vocab"], input_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq-1"]:
    """Log-probability of each token given the tokens before it, in nats.

    Args:
        logits: Logits of the model; position t predicts token t + 1.
        input_ids: Token ids.

    Returns:
        Entry t is the log-probability of token t + 1.
    """
    logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    return logps.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def sequence_logps(
    logits: Float[Tensor, "batch seq vocab"],
    input_ids: Int[Tensor, "batch seq"],
    completion_mask: Bool[Tensor, "batch seq"],
) -> Float[Tensor, " batch"]:
    """Summed log-probability of each row's completion, in nats.

    Args:
        logits: Logits of the model; position t predicts token t + 1.
        input_ids: Token ids.
        completion_mask: True for tokens of the response, EOS included.

    Returns:
        One sum for each row. It is not a mean, so a longer response usually has a lower value. A
        row without a response has 0.
    """
    return (token_logps(logits, input_ids) * completion_mask[:, 1:]).sum(-1)
