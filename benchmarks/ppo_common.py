"""PPO's trainer over a random LLaVA with 576 image tokens, on one base or as four models."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks import common
from spavl_lib.config import Config, load_config
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.heads import ScalarHeadModel
from spavl_lib.modelling.load import compute_dtype, load_processor
from spavl_lib.modelling.roles import ADAPTERS, NEVER, OneBase, Roles, SeparateModels
from spavl_lib.runs.stage import Run
from spavl_lib.trainers import ppo, ppo_rollout
from spavl_lib.trainers.rollout import Prompt, digest_of_image


def settings(shape: common.Shape, prompts: int, new_tokens: int, batch: int) -> Config:
    """The original's PPO settings: one inner pass, one minibatch. An update moves nothing."""
    return load_config(
        "smoke",
        {
            "model.adapter": "lora", "model.lora_rank": shape.lora_rank,
            "model.lora_alpha": 2 * shape.lora_rank, "ppo.preset": "original",
            "model.gradient_checkpointing": shape.gradient_checkpointing,
            "ppo.max_steps": 1, "ppo.rollout_batch_size": prompts,
            "ppo.max_new_tokens": new_tokens, "ppo.per_device_batch_size": batch,
            "ppo.learning_rate": 0.0,
        },
    )  # fmt: skip


def build_base(shape: common.Shape) -> nn.Module:
    """A random LLaVA that uses the embedded tokenizer's ids for image, BOS, EOS and padding."""
    model = common.build_model(shape)
    processor = load_processor(load_config("smoke").model)
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return model.eval()


def size_of(shape: common.Shape) -> int:
    """Parameters of one model."""
    with mock.patch.object(common, "device", lambda: torch.device("meta")):
        return sum(p.numel() for p in common.build_model(shape).parameters())


def one_base(model: nn.Module, config: Config, forbidden: tuple[int, ...]) -> OneBase:
    """What the library does: policy, reference, value and reward on one base."""
    torch.manual_seed(1)
    vlm = get_peft_model(model, lora_config(model, config.model))
    for role in ("value", "reward"):
        vlm.add_adapter(ADAPTERS[role], vlm.peft_config["default"])
    _shake(vlm)
    return OneBase(vlm, *_heads(model), forbidden)


def four_models(model: nn.Module, config: Config, forbidden: tuple[int, ...]) -> Roles:
    """What the original does: each role its own base, with the same adapters as `one_base`."""
    torch.manual_seed(1)
    source = get_peft_model(copy.deepcopy(model), lora_config(model, config.model))
    for role in ("value", "reward"):
        source.add_adapter(ADAPTERS[role], source.peft_config["default"])
    _shake(source)
    weights = {n: p.detach().clone() for n, p in source.named_parameters()}
    del source
    heads, found = dict(zip(("value", "reward"), _heads(model), strict=True)), {}
    for role in ("policy", "value", "reward"):
        base = copy.deepcopy(model)
        found[role] = get_peft_model(base, lora_config(base, config.model))
        with torch.no_grad():
            for name, parameter in found[role].named_parameters():
                if ".default." in name:
                    parameter.copy_(weights[name.replace(".default.", f".{ADAPTERS[role]}.")])
    scalar = {}
    for role, head in heads.items():
        scalar[role] = ScalarHeadModel(found[role])
        scalar[role].score = head
    return FullLogits(found["policy"], model, scalar["value"], scalar["reward"], forbidden)


class FullLogits(SeparateModels):
    """Four models, and the vocabulary's logits at every position, as the original has them."""

    def forward(
        self,
        role: str,
        *,
        width: int = 0,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        **batch: Tensor,
    ) -> tuple[Tensor, ...]:
        """As `Roles.forward`."""
        if role in ("value", "reward"):
            return super().forward(role, width=width, **batch)
        vlm = self.vlm_of(role)
        logits = vlm(**batch, use_cache=False).logits[:, :-1].float() / temperature
        logits[..., self.forbidden_ids] = NEVER
        logps = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        chosen = logps.gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
        return chosen[:, -width:], entropy[:, -width:]


def _shake(vlm: nn.Module) -> None:
    """Adapters off zero, so that roles differ."""
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)


def _heads(model: nn.Module) -> list[nn.Linear]:
    chance = torch.Generator().manual_seed(2)
    heads = []
    for _ in range(2):
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=chance) * 0.05)
        heads.append(head.to(next(model.parameters()).device))
    return heads


def prompts_of(shape: common.Shape, count: int, questions: int) -> list[Prompt]:
    """Random prompts, `questions` of them about each picture, as SPA-VL asks three."""
    tokenizer = load_processor(load_config("smoke").model).tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    chance, prompts = torch.Generator().manual_seed(0), []
    start = [tokenizer.bos_token_id, *range(10, 22)]
    for n in range(count):
        if n % questions == 0:
            side = shape.grid * shape.patch
            pixels = torch.randn(1, 3, side, side, generator=chance).to(compute_dtype())
            vision = {"pixel_values": pixels}
            picture = digest_of_image({"pixel_values": pixels.float()})
        low, high = int(shape.prompt * 0.8), int(shape.prompt * 1.2)
        length = int(torch.randint(low, high + 1, (1,), generator=chance))
        words = torch.randint(22, shape.vocabulary, (length,), generator=chance).tolist()
        ids = [*start, *[image] * shape.image_tokens, *words]
        prompts.append(Prompt(f"row{n}", "", ids, {}, vision, picture))
    return prompts


@contextlib.contextmanager
def trainer(config: Config, roles: object, prompts: list[Prompt]) -> Iterator[ppo.PPOTrainer]:
    """The library's trainer; only where its models and prompts come from is replaced.

    EOS is never said, so that every answer has the same number of tokens.

    Args:
        config: Of `settings`.
        roles: Forbidden ids -> models.
        prompts: Of every rollout.
    """
    by_id = {p.row_id: p for p in prompts}
    rows = Dataset.from_list([{"id": p.row_id, "image_name": p.image_digest} for p in prompts])

    def load_roles(model: object, where: Path, forbidden: tuple[int, ...], **_: object) -> object:
        return roles((*forbidden, 1))

    def encode_rows(_: object, rows: list[dict]) -> list[Prompt]:
        return [by_id[row["id"]] for row in rows]

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(ppo_rollout, "load_roles", load_roles),
        mock.patch.object(ppo_rollout, "encode_rows", encode_rows),
    ):
        stage = Run(config, root=Path(folder)).stage("ppo")
        yield ppo.PPOTrainer(config, stage, rows, Path(folder), False)


def step(trainer: ppo.PPOTrainer, *, cached: bool = True) -> ppo.Rollout:
    """A rollout and its update."""
    cache = trainer.tower_cache()
    cache.works = cache.works and cached
    with cache.rollout():
        rollout = trainer.roll_out(0, cache)
        trainer.update(rollout, cache)
    return rollout
