"""The four models of PPO behind one forward: policy, reference, value and reward.

With LoRA or QLoRA one base in memory is all four: an adapter each for policy, value and reward, a
scalar head each for the latter two, and the base with its adapters off for the reference. This is
what LLaVA-RLHF did first (Sun et al. 2023, arXiv:2309.14525). In full fine-tuning they are separate
models.

Gradients are right only if a role's backward comes before the next role's forward: switching an
adapter under a graph that still waits for its backward gives that graph no gradient, or, with
recomputed activations, another adapter's. Nothing warns of it, so `forward` does.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from spavl_lib.config import ModelConfig
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import freeze_for_full, lora_config, masters_in_fp32
from spavl_lib.modelling.families import tower_of
from spavl_lib.modelling.heads import (
    ScalarHeadModel,
    check_reward_model,
    in_fp32,
    last_token_index,
    load_head,
    load_reward_model,
)
from spavl_lib.modelling.load import load_model
from spavl_lib.modelling.speed.shared_prefix import apply_sharing

ROLES = ("policy", "reference", "value", "reward")
NEVER = -1e9  # a logit: its probability is 0, and unlike -inf its gradient is no NaN
# PEFT saves the adapter named "default" without a folder of its own: what others expect to find.
ADAPTERS = {"policy": "default", "value": "value", "reward": "reward"}


class Roles(nn.Module):
    """What both arrangements share: `forward` by role, over left-padded prompts and answers."""

    value_head: nn.Linear
    reward_head: nn.Linear

    def __init__(self, forbidden_ids: tuple[int, ...]):
        super().__init__()
        self.forbidden_ids = list(forbidden_ids)
        self._waiting: str | None = None

    def vlm_of(self, role: str) -> nn.Module:
        """The image-text-to-text model that plays a role."""
        raise NotImplementedError

    def as_role(self, role: str) -> contextlib.AbstractContextManager:
        """Within it, `vlm_of(role)` is that role."""
        raise NotImplementedError

    def towers(self) -> list[nn.Module]:
        """The vision towers, each once; all of them hold the same weights."""
        raise NotImplementedError

    def trainable_of(self, role: str) -> list[nn.Parameter]:
        """The parameters that train for `policy` or `value`."""
        raise NotImplementedError

    def forward(
        self,
        role: str,
        *,
        width: int = 0,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        **batch: Tensor,
    ) -> tuple[Tensor, ...]:
        """One role's view of a batch.

        Args:
            role: Of `ROLES`.
            width: Columns of the answers, the last of every row; unused by `reward`.
            temperature: Divides the logits, as in sampling.
            entropy_gradient: Whether the entropy carries a gradient; it costs memory.
            batch: `input_ids` and `attention_mask` (batch, seq), and image tensors.

        Returns:
            policy, reference: log-probability of each answer token and entropy of the distribution
            it came from, both (batch, width), in nats. value: value of the state before each token
            (batch, width). reward: score of each row (batch,), read at its last real token.

        Raises:
            RuntimeError: Another role's graph still waits for its backward.
        """
        recording = torch.is_grad_enabled()
        if recording and self._waiting not in (None, role):
            raise RuntimeError(
                f"{role} was asked for while {self._waiting} waits for its backward: its gradient "
                "would be lost. Call backward, then `after_backward()`, before the next role."
            )
        with self.as_role(role):
            hidden = _backbone(self.vlm_of(role))(**batch, use_cache=False).last_hidden_state
            if recording:
                self._waiting = role
            if role == "reward":
                last = last_token_index(batch["attention_mask"])
                rows = torch.arange(len(hidden), device=hidden.device)
                return (in_fp32(self.reward_head, hidden[rows, last]),)
            # A view with gaps would make torch multiply row by row, with copies of the whole head.
            states = hidden[:, -width - 1 : -1].contiguous()
            if role == "value":
                return (in_fp32(self.value_head, states),)
            logits = self.vlm_of(role).get_output_embeddings()(states).float() / temperature
        logits[..., self.forbidden_ids] = NEVER
        logps = torch.log_softmax(logits, dim=-1)
        with torch.set_grad_enabled(recording and entropy_gradient):
            entropy = -(logps.exp() * logps).sum(-1)
        ids = batch["input_ids"][:, -width:]
        return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy

    def after_backward(self) -> None:
        """Say that the last role's backward was called."""
        self._waiting = None


class OneBase(Roles):
    """LoRA and QLoRA: one base, an adapter a role."""

    def __init__(
        self,
        vlm: PeftModel,
        value_head: nn.Linear,
        reward_head: nn.Linear,
        forbidden_ids: tuple[int, ...],
    ):
        super().__init__(forbidden_ids)
        self.vlm, self.value_head, self.reward_head = vlm, value_head, reward_head
        self.reward_head.requires_grad_(False)
        self._own = {
            role: [p for n, p in vlm.named_parameters() if f".{adapter}." in f"{n}."]
            for role, adapter in ADAPTERS.items()
        }
        self._active = ""
        self._switch("policy")

    def vlm_of(self, role: str) -> nn.Module:
        """The one base."""
        return self.vlm

    @contextlib.contextmanager
    def as_role(self, role: str) -> Iterator[None]:
        """Switch to a role's adapter, and leave it on: its backward may recompute with it."""
        if role == "reference":
            with self.vlm.disable_adapter():
                yield
            self._restore()
        else:
            self._switch(role)
            yield

    def towers(self) -> list[nn.Module]:
        """The base's."""
        return [tower_of(self.vlm)]

    def trainable_of(self, role: str) -> list[nn.Parameter]:
        """The role's adapter and projector, and the value's head."""
        return self._own[role] + (list(self.value_head.parameters()) if role == "value" else [])

    def _switch(self, role: str) -> None:
        if self._active != role:
            self.vlm.set_adapter(ADAPTERS[role])
            self._active = role
            self._restore()

    def _restore(self) -> None:
        # Switching makes the active adapter trainable and every other one not.
        for role, parameters in self._own.items():
            for parameter in parameters:
                parameter.requires_grad_(role != "reward")


class SeparateModels(Roles):
    """Full fine-tuning: four models."""

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        value: ScalarHeadModel,
        reward: ScalarHeadModel,
        forbidden_ids: tuple[int, ...],
    ):
        super().__init__(forbidden_ids)
        self.policy, self.reference = policy, reference.requires_grad_(False)
        self.value, self.reward = value.vlm, reward.vlm.requires_grad_(False)
        self.value_head, self.reward_head = value.score, reward.score.requires_grad_(False)

    def vlm_of(self, role: str) -> nn.Module:
        """The role's own model."""
        return getattr(self, role)

    def as_role(self, role: str) -> contextlib.AbstractContextManager:
        """Nothing to do: every role has its model."""
        return contextlib.nullcontext()

    def towers(self) -> list[nn.Module]:
        """One a model."""
        return [tower_of(self.vlm_of(role)) for role in ROLES]

    def trainable_of(self, role: str) -> list[nn.Parameter]:
        """What is set to train of the role's model, and the value's head."""
        own = [p for p in self.vlm_of(role).parameters() if p.requires_grad]
        return own + (list(self.value_head.parameters()) if role == "value" else [])


def load_roles(
    config: ModelConfig,
    reward_folder: Path,
    forbidden_ids: tuple[int, ...],
    *,
    masters: bool = True,
) -> Roles:
    """Policy and reference from the base, value and reward from a trained reward model.

    Args:
        config: Of the base, and of what trains.
        reward_folder: A reward trainer's `model/`.
        forbidden_ids: Tokens the policy may never say: image slots, padding, BOS.
        masters: Whether what trains is kept in fp32 here; DeepSpeed does so itself.

    Raises:
        InputError: No reward model there, of another base, or trained in another way.
    """
    check_reward_model(config, reward_folder)
    if not config.with_lora:
        policy, value = load_model(config), load_reward_model(config, reward_folder)
        if masters:
            policy, value = policy.float(), value.float()
        freeze_for_full(policy, config)
        freeze_for_full(value.vlm, config)
        value.vlm.get_output_embeddings().requires_grad_(False)
        reward, reference = load_reward_model(config, reward_folder), load_model(config)
        for vlm in (policy, reference, value.vlm, reward.vlm):
            apply_sharing(vlm, config.share_prefix)
        return SeparateModels(policy, reference, value, reward, forbidden_ids)
    base = load_model(config)
    vlm = get_peft_model(base, lora_config(base, config))
    for role in ("value", "reward"):
        load_reward_adapter(vlm, reward_folder, role, trainable=role == "value")
    size = base.config.get_text_config().hidden_size
    heads = [load_head(reward_folder, size).to(base.device) for _ in range(2)]
    apply_sharing(vlm, config.share_prefix)
    roles = OneBase(vlm, *heads, forbidden_ids)
    if masters:
        masters_in_fp32(roles)
    return roles


def load_reward_adapter(
    vlm: PeftModel, folder: Path, role: str, *, trainable: bool = False
) -> None:
    """Add a reward model's adapter and projector to a base, under the name of a role.

    Raises:
        InputError: They do not fit the base.
    """
    name = ADAPTERS[role]
    result = vlm.load_adapter(folder, name, is_trainable=trainable, low_cpu_mem_usage=False)
    lost = [k for k in result.missing_keys if f".{name}." in k]
    if lost or result.unexpected_keys:
        raise InputError(
            f"{folder} does not fit the base: {len(lost)} missing {lost[:3]}, "
            f"{len(result.unexpected_keys)} unexpected {result.unexpected_keys[:3]}"
        )


def _backbone(vlm: nn.Module) -> nn.Module:
    return (vlm.get_base_model() if isinstance(vlm, PeftModel) else vlm).model
