"""The four models of PPO behind one forward: policy, reference, value and reward model.

With LoRA or QLoRA one base model in memory plays all four roles. Policy, value and reward model
each have an adapter, value and reward model also have a scalar head, and the reference is the base
model without adapters, as in LLaVA-RLHF (Sun et al. 2023, arXiv:2309.14525). In full fine-tuning
the four roles are separate models.

With one base, a role's backward pass must run before the next role's forward pass, which switches
the adapter. With gradient checkpointing, the backward pass recomputes activations with the adapter
that is active then. After a switch this is the next role's adapter: it gets the gradients, and the
first role's adapter gets none. No library warns of this, so `forward` raises an error.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from spavl_lib.config import ModelConfig
from spavl_lib.errors import InputError
from spavl_lib.machine import free_memory
from spavl_lib.modelling.adapters import (
    add_lora,
    compute_as_masters,
    freeze_for_full,
    masters_in_fp32,
)
from spavl_lib.modelling.families import tower_of
from spavl_lib.modelling.heads import (
    ScalarHeadModel,
    check_reward_model,
    in_fp32,
    last_token_index,
    load_head,
    load_reward_model,
)
from spavl_lib.modelling.load import autocast, load_model
from spavl_lib.modelling.speed.shared_prefix import apply_sharing

ROLES = ("policy", "reference", "value", "reward")
NEVER = -1e9  # logit of a forbidden token: its probability is 0; -inf would give NaN gradients
# PEFT saves the adapter named "default" in the top folder, where other tools look for an adapter.
ADAPTERS = {"policy": "default", "value": "value", "reward": "reward"}


class Roles(nn.Module):
    """Base class of `OneBase` and `SeparateModels`.

    `forward` computes one role. Each row is a left-padded prompt followed by a response.
    """

    value_head: nn.Linear
    reward_head: nn.Linear
    cost_head: nn.Linear | None
    """Head of the reward model that gives costs; None if costs are not used."""
    apart = False
    """Whether no two roles share a module. They may then compute at the same time."""

    def __init__(self, forbidden_ids: tuple[int, ...]):
        super().__init__()
        self.cost_head = None
        self.forbidden_ids = list(forbidden_ids)
        self._needs_backward: str | None = None

    def vlm_of(self, role: str) -> nn.Module:
        """The image-text-to-text model that plays a role."""
        raise NotImplementedError

    def as_role(self, role: str) -> contextlib.AbstractContextManager:
        """A context in which the role's adapter, if there is one, is active in `vlm_of(role)`."""
        raise NotImplementedError

    def towers(self) -> list[nn.Module]:
        """The distinct vision-tower modules. They all hold the same weights."""
        raise NotImplementedError

    def trainable_of(self, role: str) -> list[nn.Parameter]:
        """The trained parameters of a role, which is `policy` or `value`."""
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
        """Compute a batch as one role.

        Args:
            role: One of `ROLES`.
            width: The last `width` columns of every row hold the response. `reward` ignores it.
            temperature: Divides the logits, as in sampling.
            entropy_gradient: Whether the entropy has a gradient, which costs memory.
            batch: `input_ids` and `attention_mask` (batch, length), and the image tensors.

        Returns:
            For policy and reference: the log-probability of each response token, and the entropy of
            the distribution that predicts the token; both (batch, width), fp32, in nats. For value:
            the value of the state before each response token (batch, width), fp32. For reward: the
            score of each row at its last token (batch,), fp32, and with a cost head the cost.

        Raises:
            RuntimeError: The roles share a base, and another role's backward pass has not run yet.
        """
        recording = torch.is_grad_enabled()
        if recording and not self.apart and self._needs_backward not in (None, role):
            raise RuntimeError(
                f"forward of role {role!r} before backward of {self._needs_backward!r}, whose "
                "gradient would be lost. Call backward, then `after_backward()`, and then the next "
                "role."
            )
        with self.as_role(role), autocast():
            hidden = _backbone(self.vlm_of(role))(**batch, use_cache=False).last_hidden_state
            if recording:
                self._needs_backward = role
            if role == "reward":
                last = last_token_index(batch["attention_mask"])
                rows = torch.arange(len(hidden), device=hidden.device)
                heads = [self.reward_head, *([self.cost_head] if self.cost_head else [])]
                return tuple(in_fp32(head, hidden[rows, last]) for head in heads)
            # Contiguous, because for a strided view torch multiplies each row of the batch
            # separately, and copies the head's whole weight for each of them.
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
        """Record that the last role's backward pass has run."""
        self._needs_backward = None


class OneBase(Roles):
    """LoRA and QLoRA: one base model, and one adapter for each role except the reference."""

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
        self._adapters = {
            role: [p for n, p in vlm.named_parameters() if f".{adapter}." in f"{n}."]
            for role, adapter in ADAPTERS.items()
        }
        self._active = ""
        self._switch("policy")

    def vlm_of(self, role: str) -> nn.Module:
        """The base model with all adapters; it plays every role."""
        return self.vlm

    @contextlib.contextmanager
    def as_role(self, role: str) -> Iterator[None]:
        """Switch to a role's adapter; for `reference`, disable all adapters inside the context.

        A role's adapter stays active after the context, because with gradient checkpointing the
        backward pass recomputes activations with this adapter.
        """
        if role == "reference":
            with self.vlm.disable_adapter():
                yield
            self._set_trainable()
        else:
            self._switch(role)
            yield

    def towers(self) -> list[nn.Module]:
        """The base model's tower."""
        return [tower_of(self.vlm)]

    def trainable_of(self, role: str) -> list[nn.Parameter]:
        """The role's adapter and projector. For `value` also the scalar head."""
        head = list(self.value_head.parameters()) if role == "value" else []
        return self._adapters[role] + head

    def _switch(self, role: str) -> None:
        if self._active != role:
            self.vlm.set_adapter(ADAPTERS[role])
            self._active = role
            self._set_trainable()

    def _set_trainable(self) -> None:
        """Make the policy's and the value model's adapters trainable, and freeze the reward's.

        When PEFT switches or disables adapters, it also changes `requires_grad` of all of them.
        """
        for role, parameters in self._adapters.items():
            for parameter in parameters:
                parameter.requires_grad_(role != "reward")


class SeparateModels(Roles):
    """Full fine-tuning: four separate models."""

    apart = True

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
        """The model of a role."""
        return getattr(self, role)

    def as_role(self, role: str) -> contextlib.AbstractContextManager:
        """An empty context: every role has its own model, so nothing is switched."""
        return contextlib.nullcontext()

    def towers(self) -> list[nn.Module]:
        """The tower of each model."""
        return [tower_of(self.vlm_of(role)) for role in ROLES]

    def trainable_of(self, role: str) -> list[nn.Parameter]:
        """The trained parameters of the role's model. For `value` also the scalar head."""
        trained = [p for p in self.vlm_of(role).parameters() if p.requires_grad]
        return trained + (list(self.value_head.parameters()) if role == "value" else [])


def load_roles(
    config: ModelConfig,
    reward_folder: Path,
    forbidden_ids: tuple[int, ...],
    *,
    masters: bool = True,
    with_cost: bool = False,
) -> Roles:
    """Load all roles: policy and reference from the base, value and reward from a reward model.

    Args:
        config: The base model, and the settings that say which of its parameters train.
        reward_folder: A reward trainer's `model/`.
        forbidden_ids: Token ids that the policy must never generate: image slots, padding, BOS.
        masters: Whether to cast trained parameters to fp32. False under DeepSpeed, which keeps fp32
            master weights itself.
        with_cost: Whether to load the reward model's cost head too.

    Raises:
        InputError: See `check_reward_model`.
    """
    check_reward_model(config, reward_folder, needs_cost=with_cost)
    # The caller may have dropped an earlier `Roles`. Its memory must be free before new models are
    # loaded, because a GPU has no memory for two `Roles`.
    free_memory()
    if not config.with_lora:
        policy, value = load_model(config), load_reward_model(config, reward_folder)
        reward, reference = load_reward_model(config, reward_folder), load_model(config)
        if masters:
            policy, value = policy.float(), value.float()
            compute_as_masters(reference)
        freeze_for_full(policy, config)
        freeze_for_full(value.vlm, config)
        value.vlm.get_output_embeddings().requires_grad_(False)
        for vlm in (policy, reference, value.vlm, reward.vlm):
            apply_sharing(vlm, config.share_prefix)
        roles = SeparateModels(policy, reference, value, reward, forbidden_ids)
        if with_cost:
            roles.cost_head = load_head(reward_folder, reward.score.in_features, "cost")
            roles.cost_head.to(reward.device).requires_grad_(False)
        return roles
    base = load_model(config)
    vlm = add_lora(base, config)
    for role in ("value", "reward"):
        load_reward_adapter(vlm, reward_folder, role, trainable=role == "value")
    size = base.config.get_text_config().hidden_size
    value_head, reward_head = (load_head(reward_folder, size).to(base.device) for _ in range(2))
    apply_sharing(vlm, config.share_prefix)
    roles = OneBase(vlm, value_head, reward_head, forbidden_ids)
    if with_cost:
        head = load_head(reward_folder, size, "cost").to(base.device)
        roles.cost_head = head.requires_grad_(False)
    if masters:
        masters_in_fp32(roles)
    return roles


def load_reward_adapter(
    vlm: PeftModel, folder: Path, role: str, *, trainable: bool = False
) -> None:
    """Add a reward model's adapter and projector to a base model, for one role.

    Args:
        vlm: The base model with adapters; changed in place.
        folder: A reward trainer's `model/`.
        role: Role that the adapter will play.
        trainable: Whether the adapter is trained.

    Raises:
        InputError: The adapter does not fit the base model.
    """
    name = ADAPTERS[role]
    result = vlm.load_adapter(folder, name, is_trainable=trainable, low_cpu_mem_usage=False)
    missing = [k for k in result.missing_keys if f".{name}." in k]
    if missing or result.unexpected_keys:
        raise InputError(
            f"the adapter in {folder} does not fit the base model: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(result.unexpected_keys)} unexpected {result.unexpected_keys[:3]}"
        )


def _backbone(vlm: nn.Module) -> nn.Module:
    return (vlm.get_base_model() if isinstance(vlm, PeftModel) else vlm).model
