"""PPO under a limit on the cost: the Lagrange multiplier, and the score that it gives."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Scores = Float[Tensor, " batch"]


def lagrangian_scores(rewards: Scores, costs: Scores, *, log_multiplier: float) -> Scores:
    """Score of each response: (reward - lambda * cost) / (1 + lambda).

    The division keeps the scores on the scale of rewards and costs, however large lambda is.

    Args:
        rewards: The reward model's score of each response.
        costs: The cost of each response.
        log_multiplier: Natural logarithm of lambda. The weights of reward and cost are computed
            from it as 1 / (1 + lambda) = sigmoid(-log lambda) and lambda / (1 + lambda) =
            sigmoid(log lambda), so a large lambda cannot overflow.

    Source: Dai et al. 2023, *Safe RLHF*, arXiv:2310.12773.
    """
    log_lambda = torch.tensor(log_multiplier, dtype=torch.float64)
    weight = torch.sigmoid(log_lambda).item()
    return torch.sigmoid(-log_lambda).item() * rewards - weight * costs


class LagrangeMultiplier:
    """The multiplier lambda of the cost, which rises while the mean cost is above a limit.

    One update adds `learning_rate * (mean cost - limit)` to log lambda. This is dual ascent in
    multiplicative form, which keeps lambda above 0. Safe RLHF also multiplies the step by lambda.
    Lambda then grows faster than exponentially while the limit is broken, and needs a largest
    value, which this form does not.

    Args:
        initial: Lambda at the start, above 0.
        limit: Largest mean cost of the responses.
        learning_rate: Change of log lambda for each unit of cost above the limit.

    Source: Dai et al. 2023, *Safe RLHF*, arXiv:2310.12773, and for vision-language models Ji et al.
    2025, *Safe RLHF-V*, arXiv:2503.17682.
    """

    def __init__(self, initial: float, *, limit: float, learning_rate: float):
        self.log_value, self.limit, self.learning_rate = math.log(initial), limit, learning_rate

    @property
    def value(self) -> float:
        """Lambda; infinity if it is too large for a float."""
        return math.exp(self.log_value) if self.log_value < 709 else math.inf

    def scores(self, rewards: Scores, costs: Scores) -> Scores:
        """`lagrangian_scores` with the present lambda.

        Args:
            rewards: The reward model's score of each response.
            costs: The cost of each response.
        """
        return lagrangian_scores(rewards, costs, log_multiplier=self.log_value)

    def update(self, mean_cost: float) -> None:
        """Raise lambda if the mean cost of a rollout is above the limit; otherwise lower it."""
        self.log_value += self.learning_rate * (mean_cost - self.limit)

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint."""
        return {"log_value": self.log_value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load the result of `state_dict`."""
        self.log_value = state["log_value"]
