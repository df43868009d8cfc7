"""A scalar head on a vision-language model: reward of an answer, or value of every state in it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from spavl_lib import machine
from spavl_lib.config import ModelConfig
from spavl_lib.distributed import zero_parameters
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import load_policy, weights_sha256

HEAD_FILE, HEAD_CONFIG = "score_head.safetensors", "reward_config.json"


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Position of each row's last real token (batch,), whatever the padding side."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask.bool(), positions, -1).amax(dim=1)


def in_fp32(head: nn.Linear, states: Tensor) -> Tensor:
    """A scalar head's output; in half precision a score near 4 would have steps of 0.02."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype)).squeeze(-1).float()


class ScalarHeadModel(nn.Module):
    """Any image-text-to-text model's backbone, and a linear head without bias, in fp32."""

    def __init__(self, vlm: nn.Module):
        super().__init__()
        self.vlm = vlm
        size = vlm.config.get_text_config().hidden_size
        self.score = nn.Linear(size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=1 / (size + 1) ** 0.5)

    @property
    def backbone(self) -> PreTrainedModel:
        """The model below the language-model head."""
        base = self.vlm.get_base_model() if hasattr(self.vlm, "get_base_model") else self.vlm
        return base.model

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.score.weight.device

    def hidden_states(self, **batch: Tensor) -> Tensor:
        """Last hidden states (batch, seq, hidden)."""
        return self.backbone(**batch, use_cache=False).last_hidden_state

    def forward(
        self, completion_mask: Tensor | None = None, **batch: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Score of each row (batch,), read at its last real token.

        Args:
            completion_mask: If given (batch, seq), the mean log-probability of the marked tokens of
                each row's answer comes second (batch,), in nats, through the language-model head.
            batch: `input_ids` and `attention_mask` (batch, seq), and image tensors.
        """
        hidden = self.hidden_states(**batch)
        last = last_token_index(batch["attention_mask"])
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        scores = in_fp32(self.score, hidden[rows, last])
        if completion_mask is None:
            return scores
        said = completion_mask[:, 1:].bool()
        logits = self.vlm.get_output_embeddings()(hidden[:, :-1][said]).float()
        logps = -cross_entropy(logits, batch["input_ids"][:, 1:][said], reduction="none")
        owner = said.nonzero()[:, 0]
        sums = torch.zeros_like(scores).index_add(0, owner, logps.to(scores.dtype))
        return scores, sums / said.sum(1).clamp(min=1)


def save_reward_model(model: ScalarHeadModel, folder: Path, config: ModelConfig) -> None:
    """Write adapter or weights, projector and head together, as safetensors."""
    state = zero_parameters.for_saving(model.vlm)
    head = zero_parameters.whole({"score.weight": model.score.weight})
    if not machine.is_main():
        return
    model.vlm.save_pretrained(folder, **state)
    save_file({k: v.cpu().contiguous() for k, v in head.items()}, folder / HEAD_FILE)
    description = {
        "base_model": config.name,
        "base_weights": weights_sha256(config),
        "hidden_size": model.score.in_features,
    }
    (folder / HEAD_CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def check_reward_model(config: ModelConfig, folder: Path) -> None:
    """Whether a folder holds a reward model of this very base, trained the same way.

    Raises:
        InputError: The head is missing, the base is another, or only one of the two is an adapter.
    """
    for name in (HEAD_CONFIG, HEAD_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is no reward model: {name} is missing")
    description = json.loads((folder / HEAD_CONFIG).read_text(encoding="utf-8"))
    if description["base_model"] != config.name or (
        description["base_weights"] != weights_sha256(config)
    ):
        raise InputError(
            f"{folder} was trained on {description['base_model']!r} (or other weights of it), "
            f"the policy is {config.name!r}: train the reward model on the same base"
        )
    adapter = (folder / "adapter_config.json").is_file()
    if adapter != config.with_lora:
        kind = "an adapter" if adapter else "a whole model"
        raise InputError(
            f"{folder} is {kind}, but model.adapter is {config.adapter!r}: train the reward "
            "model with the same model.adapter"
        )


def load_head(folder: Path, size: int) -> nn.Linear:
    """The scalar head alone.

    Raises:
        InputError: It is for a backbone of another width.
    """
    weight = load_file(folder / HEAD_FILE)["score.weight"]
    if weight.shape != (1, size):
        raise InputError(
            f"{folder / HEAD_FILE}: a head of {tuple(weight.shape)}, the backbone wants (1, {size})"
        )
    head = nn.Linear(size, 1, bias=False, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def load_reward_model(config: ModelConfig, folder: Path) -> ScalarHeadModel:
    """Read back what `save_reward_model` wrote: equal scores, in one call.

    Args:
        config: Of the base the policy uses.
        folder: A reward trainer's `model/`.

    Raises:
        InputError: The head is missing, or the model was trained on another base.
    """
    check_reward_model(config, folder)
    model = ScalarHeadModel(load_policy(config, folder))
    model.score = load_head(folder, model.score.in_features)
    return model.to(next(model.vlm.parameters()).device).eval()
