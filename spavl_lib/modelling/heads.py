"""A scalar head on a vision-language model: the reward model, and PPO's value model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from spavl_lib import machine
from spavl_lib.config import ModelConfig
from spavl_lib.distributed import zero_parameters
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import compute_as_masters
from spavl_lib.modelling.load import autocast, load_policy, weights_sha256
from spavl_lib.runs.files import let_others_read

HEAD_FILE, HEAD_CONFIG = "score_head.safetensors", "reward_config.json"


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Index of each row's last token that is not padding. Padding may be on either side.

    Args:
        attention_mask: (batch, length), 1 on tokens, 0 on padding.

    Returns:
        (batch,), int64.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask.bool(), positions, -1).amax(dim=1)


def in_fp32(head: nn.Linear, states: Tensor) -> Tensor:
    """A scalar head's output in fp32. bf16 can only represent scores near 4 in steps of 0.02.

    Args:
        head: The scalar head, with fp32 weights.
        states: Hidden states (..., hidden), of any dtype.

    Returns:
        (...), fp32.
    """
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype)).squeeze(-1).float()


def _new_head(size: int) -> nn.Linear:
    head = nn.Linear(size, 1, bias=False, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1 / (size + 1) ** 0.5)
    return head


class ScalarHeadModel(nn.Module):
    """The backbone of an image-text-to-text model, and an fp32 linear head without bias.

    Args:
        vlm: The model.
        with_cost: Whether to add a second head, which gives the cost of a response.
    """

    def __init__(self, vlm: nn.Module, *, with_cost: bool = False):
        super().__init__()
        self.vlm = vlm
        size = vlm.config.get_text_config().hidden_size
        self.score = _new_head(size)
        self.cost = _new_head(size) if with_cost else None

    @property
    def backbone(self) -> PreTrainedModel:
        """The model without its language-model head."""
        base = self.vlm.get_base_model() if hasattr(self.vlm, "get_base_model") else self.vlm
        return base.model

    @property
    def device(self) -> torch.device:
        """The head's device."""
        return self.score.weight.device

    def hidden_states(self, **batch: Tensor) -> Tensor:
        """The last hidden states (batch, length, hidden), computed under `autocast`."""
        with autocast():
            return self.backbone(**batch, use_cache=False).last_hidden_state

    def forward(
        self, completion_mask: Tensor | None = None, *, costs: bool = False, **batch: Tensor
    ) -> Any:
        """Score each row at its last token.

        Args:
            completion_mask: (batch, length), 1 on the tokens of the response; or None.
            costs: Whether to return costs too. The model must have a cost head.
            batch: `input_ids` and `attention_mask` (batch, length), and the image tensors.

        Returns:
            Scores (batch,), fp32. With `costs` a tuple, whose second item is the costs (batch,),
            fp32. With `completion_mask` a tuple, whose last item is each row's mean log-probability
            of its response tokens (batch,), in nats, computed with the language-model head.
        """
        hidden = self.hidden_states(**batch)
        last = last_token_index(batch["attention_mask"])
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        scores = in_fp32(self.score, hidden[rows, last])
        outputs = [scores]
        if costs:
            assert self.cost is not None
            outputs.append(in_fp32(self.cost, hidden[rows, last]))
        if completion_mask is None:
            return tuple(outputs) if costs else scores
        mask = completion_mask[:, 1:].bool()
        with autocast():
            logits = self.vlm.get_output_embeddings()(hidden[:, :-1][mask]).float()
        logps = -cross_entropy(logits, batch["input_ids"][:, 1:][mask], reduction="none")
        row_of = mask.nonzero()[:, 0]
        sums = torch.zeros_like(scores).index_add(0, row_of, logps.to(scores.dtype))
        return *outputs, sums / mask.sum(1).clamp(min=1)


def save_reward_model(model: ScalarHeadModel, folder: Path, config: ModelConfig) -> None:
    """Write a reward model into a folder, as safetensors. Only the main process writes.

    Every process must call this function, because ZeRO-3 gathers the weights from all processes.

    Args:
        model: The reward model.
        folder: Target of the adapter or the full weights, the projector and the heads.
        config: The base model. Its name and the hashes of its weights are written too.
    """
    state = zero_parameters.for_saving(model.vlm)
    heads = {"score.weight": model.score.weight}
    if model.cost is not None:
        heads["cost.weight"] = model.cost.weight
    heads = zero_parameters.whole(heads)
    if not machine.is_main():
        return
    model.vlm.save_pretrained(folder, **state)
    save_file({k: v.cpu().contiguous() for k, v in heads.items()}, folder / HEAD_FILE)
    let_others_read(folder)
    description = {
        "base_model": config.name,
        "base_weights": weights_sha256(config),
        "hidden_size": model.score.in_features,
    }
    (folder / HEAD_CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def has_cost_head(folder: Path) -> bool:
    """Whether the reward model in a folder has a cost head beside the reward head."""
    with safe_open(folder / HEAD_FILE, framework="pt") as file:
        return "cost.weight" in file.keys()  # noqa: SIM118 - the file cannot be iterated


def check_reward_model(config: ModelConfig, folder: Path, *, needs_cost: bool = False) -> None:
    """Check that a folder holds a reward model of this base, with an adapter if the policy has one.

    Args:
        config: The policy's base model.
        folder: A reward trainer's `model/`.
        needs_cost: Whether the reward model must have a cost head.

    Raises:
        InputError: A file is missing, the base differs, only one of policy and reward model is an
            adapter, or the cost head is missing.
    """
    for name in (HEAD_CONFIG, HEAD_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no reward model: {name} is missing")
    description = json.loads((folder / HEAD_CONFIG).read_text(encoding="utf-8"))
    if description["base_model"] != config.name or (
        description["base_weights"] != weights_sha256(config)
    ):
        raise InputError(
            f"the reward model in {folder} was trained on {description['base_model']!r} (or other "
            f"weights of it), but the policy is {config.name!r}. Train both on the same base"
        )
    adapter = (folder / "adapter_config.json").is_file()
    if adapter != config.with_lora:
        kind = "an adapter" if adapter else "a whole model"
        raise InputError(
            f"the reward model in {folder} is {kind}, but model.adapter is {config.adapter!r}. "
            "Train it with the same model.adapter"
        )
    if needs_cost and not has_cost_head(folder):
        raise InputError(
            f"the reward model in {folder} has no cost head, which ppo.cost_limit needs; train one "
            "with reward.cost_coef above 0, or set ppo.cost_limit to none"
        )


def load_head(folder: Path, size: int, name: str = "score") -> nn.Linear:
    """A scalar head of a reward model, without the backbone.

    Args:
        folder: A reward trainer's `model/`.
        size: Width of the backbone's hidden states.
        name: Name of the head: score or cost.

    Raises:
        InputError: The head was trained for a backbone of another width.
    """
    weight = load_file(folder / HEAD_FILE)[f"{name}.weight"]
    if weight.shape != (1, size):
        raise InputError(
            f"{folder / HEAD_FILE} has shape {tuple(weight.shape)}, the backbone needs (1, {size})"
        )
    head = nn.Linear(size, 1, bias=False, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def load_reward_model(config: ModelConfig, folder: Path) -> ScalarHeadModel:
    """Load a reward model that `save_reward_model` wrote. Saving and loading keep scores unchanged.

    Args:
        config: The policy's base model.
        folder: A reward trainer's `model/`.

    Raises:
        InputError: See `check_reward_model`.
    """
    check_reward_model(config, folder)
    vlm = load_policy(config, folder)
    model = ScalarHeadModel(vlm if config.with_lora else compute_as_masters(vlm))
    size = model.score.in_features
    model.score = load_head(folder, size)
    if has_cost_head(folder):
        model.cost = load_head(folder, size, "cost")
    return model.to(next(model.vlm.parameters()).device).eval()
