"""Log-probabilities of tokens and answers, against closed forms."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from spavl_lib.objectives.logps import sequence_logps, token_logps

# Softmax of (0, ln 2, ln 5) is (1, 2, 5) / 8.
LOGITS = torch.tensor([0.0, math.log(2), math.log(5)])


def test_token_logps_by_hand() -> None:
    """Position t scores token t + 1: three tokens, two numbers."""
    logits = torch.stack([LOGITS, LOGITS + 7.0, LOGITS]).unsqueeze(0)
    ids = torch.tensor([[0, 2, 1]])
    found = token_logps(logits, ids)
    expected = torch.tensor([[math.log(5 / 8), math.log(2 / 8)]])
    assert torch.allclose(found, expected, atol=1e-6, rtol=0)


def test_sequence_logps_sum_what_the_mask_marks() -> None:
    logits = LOGITS.expand(3, 4, 3)
    ids = torch.tensor([[0, 2, 1, 0]]).expand(3, 4)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    found = sequence_logps(logits, ids, mask)
    expected = torch.tensor([
        math.log(5 / 8) + math.log(2 / 8),
        math.log(2 / 8) + math.log(1 / 8),
        0.0,
    ])  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-6, rtol=0)


def test_the_first_token_has_no_log_probability() -> None:
    """Nothing comes before it, so its mask changes nothing."""
    logits, ids = LOGITS.expand(1, 3, 3), torch.tensor([[0, 2, 1]])
    with_first = sequence_logps(logits, ids, torch.tensor([[True, True, False]]))
    without = sequence_logps(logits, ids, torch.tensor([[False, True, False]]))
    assert torch.equal(with_first, without) and without.item() == pytest.approx(math.log(5 / 8))


def test_sums_are_cross_entropies() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(4, 9, 17), torch.randint(0, 17, (4, 9))
    mask = torch.rand(4, 9) < 0.5
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    entropies = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 17), labels.reshape(-1), reduction="none", ignore_index=-100
    ).view(4, 8)
    assert torch.allclose(sequence_logps(logits, ids, mask), -entropies.sum(1), atol=1e-5)
    assert (entropies.sum(1) > 1).all()


def test_half_precision_is_scored_in_float32() -> None:
    logits = torch.full((1, 2, 3), 0.0, dtype=torch.bfloat16)
    found = token_logps(logits, torch.tensor([[0, 1]]))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(-math.log(3), abs=1e-6)


def test_masked_positions_give_no_gradient() -> None:
    logits = LOGITS.repeat(1, 4, 1).requires_grad_()
    ids, mask = torch.tensor([[0, 2, 1, 0]]), torch.tensor([[False, False, True, False]])
    sequence_logps(logits, ids, mask).sum().backward()
    grad = logits.grad[0]
    assert torch.equal(grad[[0, 2, 3]], torch.zeros(3, 3))
    # d log p_k / d logits = one-hot - softmax
    assert torch.allclose(grad[1], torch.tensor([-1 / 8, 6 / 8, -5 / 8]), atol=1e-6)


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        sequence_logps(LOGITS.expand(2, 4, 3), torch.zeros(2, 4, dtype=torch.long),
                       torch.ones(2, 5).bool())  # fmt: skip
    with pytest.raises(TypeCheckError):  # a mask of numbers is no mask
        sequence_logps(LOGITS.expand(2, 4, 3), torch.zeros(2, 4, dtype=torch.long),
                       torch.ones(2, 4))  # fmt: skip
