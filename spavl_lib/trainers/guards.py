"""Sanity checks that every trainer runs.

The checks verify that numbers are finite, that masks are correct, and that exactly the trainable
parameters change. The `gate_` functions raise an error on NaN or infinity, before anything is
updated or saved.
"""

import unicodedata

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.schema import TURN
from spavl_lib.data.templates import end_ids, neutralise
from spavl_lib.distributed import group, zero_parameters
from spavl_lib.errors import NonFiniteError
from spavl_lib.modelling.families import family_of

# The messages about NaN or infinity end with this advice.
REMEDY = (
    "nothing was updated, and the last checkpoint is intact; check these rows, or lower the "
    "learning rate"
)

# The loss scale at which the loss is not multiplied. In fp16 a loss scaler multiplies the loss, at
# first by 65,536, and halves this scale whenever a gradient overflows. If a gradient overflows at a
# scale of 1 or less, the scale is not the cause, and the gradient itself is faulty.
OWN_SCALE = 1.0


def gate_loss(loss: Tensor, step: int, row_ids: list[str]) -> None:
    """Raise if the loss is NaN or infinite, before the optimizer step.

    Args:
        loss: The loss ().
        step: Number of the step, for the message.
        row_ids: Ids of the batch's rows, for the message.

    Raises:
        NonFiniteError: The loss is NaN or infinite. The message names the step and the rows.
    """
    if not torch.isfinite(loss).all():
        raise NonFiniteError(
            f"step {step}: loss is {loss.item()} on rows {', '.join(row_ids)}; {REMEDY}"
        )


def gate_gradients(model: nn.Module, step: int, row_ids: list[str]) -> None:
    """Raise if a gradient is NaN or infinite, before the optimizer step.

    Args:
        model: The model whose gradients are checked.
        step: Number of the step, for the message.
        row_ids: Ids of the batch's rows, for the message.

    Raises:
        NonFiniteError: A gradient is NaN or infinite. The message names the step, the first such
            parameter and the rows.
    """
    bad = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    if bad:
        raise NonFiniteError(
            f"step {step}: gradient of {bad[0]} (and {len(bad) - 1} more) is not finite on rows "
            f"{', '.join(row_ids)}; {REMEDY}"
        )


def gate_weights(named: dict[str, Tensor], step: int, row_ids: list[str]) -> None:
    """Raise if a weight is NaN or infinite after the last update, before the weights are saved.

    Args:
        named: Weights by name.
        step: Number of the step, for the message.
        row_ids: Ids of the last batch's rows, for the message.

    Raises:
        NonFiniteError: A weight is NaN or infinite. The message names the step, the first such
            weight and the rows.
    """
    bad = [name for name, value in named.items() if not torch.isfinite(value).all()]
    if bad:
        raise NonFiniteError(
            f"step {step}: weight {bad[0]} (and {len(bad) - 1} more) is not finite after rows "
            f"{', '.join(row_ids)}; nothing was saved, and the last checkpoint is intact; check "
            "these rows, or lower the learning rate"
        )


def check_batch(
    batch: dict[str, Tensor],
    rows: list[dict],
    processor: ProcessorMixin,
    image_token_id: int | None,
    *,
    all_turns: bool = False,
) -> None:
    """Decode a collated batch and compare it with its rows.

    Args:
        batch: Tensors of a collator: ids and masks (responses, seq), chosen responses first.
        rows: The rows of the batch: pairs, or rows with a single response in `completion`.
        processor: Processor that the collator uses.
        image_token_id: Token id of an image slot. None if the model has no image token.
        all_turns: Whether the masks also cover the assistant's earlier turns.

    Raises:
        AssertionError: A mask does not cover exactly the response (or the assistant's turns) with
            its end token; or BOS is missing or doubled; or a row has too few or too many image
            slots.
    """
    tokenizer, ends = processor.tokenizer, end_ids(processor)
    bos = tokenizer.bos_token_id
    sides = ("completion",) if "completion" in rows[0] else ("chosen", "rejected")
    answers = [row[side] for side in sides for row in rows]
    prompts = [PromptCollator(processor)([row])["input_ids"][0].tolist() for row in rows]
    expected_slots = [ids.count(image_token_id) for ids in prompts]
    for i, expected in enumerate(answers):
        ids = batch["input_ids"][i]
        mask = batch["completion_mask"][i].bool()
        real = ids[batch["attention_mask"][i].bool()].tolist()
        earlier = rows[i % len(rows)]["prompt"].split(TURN)[1::2] if all_turns else []
        parts = [ids[part].tolist() for part in _runs(mask)]
        if len(parts) != len(earlier) + 1:
            raise AssertionError(
                f"row {i}: the mask covers {len(parts)} turns, expected {len(earlier) + 1}"
            )
        for place, (scored, said) in enumerate(zip(parts, [*earlier, expected], strict=True), 1):
            # Some templates write no end token after earlier turns.
            ended = place == len(parts) or scored[-1] in ends
            words = scored[:-1] if ended else scored
            # Some tokenizers compose Unicode characters. The text looks the same, so compare NFC.
            text = unicodedata.normalize("NFC", tokenizer.decode(words)).strip()
            if text != unicodedata.normalize("NFC", neutralise(said, processor)).strip():
                raise AssertionError(f"row {i}: the mask covers {text!r}, expected {said!r}")
            if (ended and scored[-1] not in ends) or not set(ends).isdisjoint(words):
                raise AssertionError(f"row {i}: the response does not end in exactly one end token")
        # A template may open every turn with the token that is also BOS. The row must have as many
        # BOS tokens as its prompt alone.
        head, written = real[: len(real) - len(scored)], prompts[i % len(rows)].count(bos)
        if bos is not None and (head[0] != bos or head[1:2] == [bos] or head.count(bos) != written):
            raise AssertionError(
                f"row {i}: {head.count(bos)} BOS tokens before the response, expected {written}; "
                "exactly one must open the row"
            )
        has_image = rows[i % len(rows)].get("image") is not None
        slots = real.count(image_token_id)
        if image_token_id is not None and has_image != (slots > 0):
            raise AssertionError(
                f"row {i}: it has {'an' if has_image else 'no'} image, but {slots} image tokens"
            )
        if image_token_id is not None and slots != expected_slots[i % len(rows)]:
            raise AssertionError(
                f"row {i}: {slots} image tokens, but its prompt alone has "
                f"{expected_slots[i % len(rows)]}"
            )


def _runs(mask: Tensor) -> list[slice]:
    """The runs of True in a mask (tokens,)."""
    edges = torch.diff(torch.nn.functional.pad(mask.int(), (1, 1))).nonzero()
    return [slice(*ends) for ends in edges.view(-1, 2).tolist()]


def check_steps_taken(taken: int, steps: int) -> None:
    """Raise if the loss scaler skipped every step of a finished training.

    Args:
        taken: Number of optimizer steps that changed the weights.
        steps: Number of all steps of the training.

    Raises:
        NonFiniteError: `steps` is not 0, but `taken` is.
    """
    if steps and not taken:
        raise NonFiniteError(
            f"all {steps} steps were skipped, because every scaled gradient overflowed fp16, so "
            "nothing was learnt; train for more steps, which lets the loss scale fall, or set "
            "$SPAVL_DTYPE to bf16 or fp32"
        )


class Movement:
    """A check that trained parameters have changed since the start, and that frozen ones have not.

    Args:
        model: The model at the start.
    """

    def __init__(self, model: nn.Module):
        self.start = {n: self._fingerprint(p) for n, p in model.named_parameters()}

    @staticmethod
    def _fingerprint(parameter: Tensor) -> tuple[float, float]:
        """Compute sum and sum of squares of this process's shard, in fp64.

        For integers, such as 4-bit weights, the second number is 0.
        """
        value = zero_parameters.shard(parameter)
        if not value.is_floating_point():
            return (float(value.to(torch.float64).sum()), 0.0)
        value = value.double()
        return (float(value.sum()), float((value * value).sum()))

    def check(self, model: nn.Module, images: bool = True) -> "Movement | None":
        """Compare the model with the start.

        Args:
            model: The model now.
            images: Whether any batch so far held an image. Without images no gradient reaches the
                parameters that process images. They then need not have changed, and a later check
                is needed.

        Returns:
            Self if a later check is needed, because `images` is False; else None.

        Raises:
            AssertionError: A frozen parameter changed, or a trained parameter did not. The message
                names up to five of each kind.
        """
        moved, still, family = [], [], family_of(model)
        changes = [self._fingerprint(p) != self.start[n] for n, p in model.named_parameters()]
        # Under ZeRO-3 a parameter's shard may be unchanged in one process but changed in another. A
        # parameter counts as changed if any process's shard has changed.
        anywhere = group.any_of_each(torch.tensor(changes)).tolist()
        for (name, parameter), changed in zip(model.named_parameters(), anywhere, strict=True):
            if changed and not parameter.requires_grad:
                moved.append(name)
            if parameter.requires_grad and not changed:
                part = family.part_of(name)
                if images or not (part in ("tower", "projector") or "cross_attn" in name):
                    still.append(name)
        if moved or still:
            raise AssertionError(
                f"frozen parameters that moved: {moved[:5]}; trained parameters that did not: "
                f"{still[:5]}"
            )
        return None if images else self
