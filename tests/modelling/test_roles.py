"""Four roles: on one base they compute, and learn, exactly what separate models would."""

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.heads import HEAD_FILE, ScalarHeadModel, load_reward_model
from spavl_lib.modelling.load import load_model
from spavl_lib.modelling.roles import OneBase, Roles, load_roles
from spavl_lib.modelling.speed.tower_cache import TowerCache
from spavl_lib.objectives.logps import token_logps
from spavl_lib.trainers.rollout import Prompt, batch_of, encode_rows
from tests.helpers import (
    embedded_model,
    embedded_processor,
    mini_rows,
    shake,
    smoke,
    spread,
    tiny,
    write_reward_model,
)

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "idefics3")


def answered(processor: object, count: int) -> tuple[list[Prompt], list[list[int]]]:
    """Rows of mini with their chosen answers as ids, of unequal lengths."""
    rows = spread(mini_rows(), count)
    ids = [
        processor.tokenizer.encode(" " + r["chosen"], add_special_tokens=False)[: 5 + 3 * n]
        + [processor.tokenizer.eos_token_id]
        for n, r in enumerate(rows)
    ]
    return encode_rows(processor, rows), ids


def batch(count: int = 3) -> tuple[dict[str, Tensor], int, Tensor]:
    processor = embedded_processor()
    prompts, answers = answered(processor, count)
    width = max(map(len, answers))
    mask = torch.arange(width)[None] < torch.tensor([len(a) for a in answers])[:, None]
    pad = processor.tokenizer.pad_token_id
    return batch_of(prompts, answers, pad, torch.device("cpu")), width, mask


@pytest.mark.parametrize("kind", ["lora", "full"])
@torch.no_grad()
def test_policy_starts_at_the_reference_and_value_at_the_reward(
    kind: str, reward_folders: dict[str, Path]
) -> None:
    config = smoke({"model.adapter": kind}).model
    roles = load_roles(config, reward_folders[kind], ()).eval()
    inputs, width, mask = batch()
    policy, _ = roles("policy", width=width, **inputs)
    reference, _ = roles("reference", width=width, **inputs)
    assert torch.equal(policy * mask, reference * mask)
    plain = embedded_model()(**inputs).logits
    expected = token_logps(plain, inputs["input_ids"])[:, -width:]
    torch.testing.assert_close(reference * mask, expected * mask, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1
    # The value before the token after the answer's last is what the reward model says of it all.
    longer = {k: v for k, v in inputs.items()}
    for name in ("input_ids", "attention_mask"):
        longer[name] = torch.cat([inputs[name], torch.ones_like(inputs[name][:, :1])], 1)
    (values,) = roles("value", width=width + 1, **longer)
    (scores,) = roles("reward", **inputs)
    last = mask.sum(1)
    torch.testing.assert_close(values[torch.arange(3), last], scores, atol=1e-4, rtol=1e-4)
    assert scores.std() > 1e-3


def separate(folder: Path, roles: OneBase) -> tuple[nn.Module, nn.Module]:
    """The same policy and value model, each on a base of its own."""
    config = smoke({"model.adapter": "lora"}).model
    models = []
    for adapter in ("default", "value"):
        base = load_model(config)
        vlm = get_peft_model(base, lora_config(base, config))
        own = vlm.state_dict()
        mine = roles.vlm.state_dict()
        renamed = {k: mine[k.replace(".default", f".{adapter}")] for k in own if ".default" in k}
        assert not vlm.load_state_dict(renamed, strict=False).unexpected_keys
        model = ScalarHeadModel(vlm)
        model.score = copy.deepcopy(roles.value_head)
        models.append(model.train())
    return models[0], models[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_separate_models(
    checkpointing: bool, reward_folders: dict[str, Path]
) -> None:
    config = smoke({"model.adapter": "lora", "model.share_prefix": "off"}).model
    roles = load_roles(config, reward_folders["lora"], ()).train()
    shake_policy = [p for n, p in roles.vlm.named_parameters() if "lora_B.default" in n]
    with torch.no_grad():
        for parameter in shake_policy:
            parameter.add_(0.03 * torch.randn_like(parameter))
    policy, value = separate(reward_folders["lora"], roles)
    if checkpointing:
        for vlm in (roles.vlm, policy.vlm, value.vlm):
            vlm.gradient_checkpointing_enable({"use_reentrant": False})
            vlm.enable_input_require_grads()
    inputs, width, mask = batch()
    with torch.no_grad():
        roles("reference", width=width, **inputs)
        roles("reward", **inputs)  # other roles before: as in a rollout
    logps, _ = roles("policy", width=width, **inputs)
    (logps * mask).sum().backward()
    roles.after_backward()
    (values,) = roles("value", width=width, **inputs)
    ((values - 1) ** 2 * mask).sum().backward()
    roles.after_backward()

    logits = policy.vlm(**inputs).logits
    (token_logps(logits, inputs["input_ids"])[:, -width:] * mask).sum().backward()
    hidden = value.hidden_states(**inputs)[:, -width - 1 : -1]
    ((value.score(hidden).squeeze(-1) - 1) ** 2 * mask).sum().backward()
    for adapter, model in (("default", policy), ("value", value)):
        mine = {n: p for n, p in roles.vlm.named_parameters() if f".{adapter}." in f"{n}."}
        theirs = {n: p for n, p in model.vlm.named_parameters() if p.requires_grad}
        assert len(mine) == len(theirs) > 20
        for name, parameter in theirs.items():
            gradient = mine[name.replace(".default", f".{adapter}")].grad
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)
        assert max(p.grad.abs().max() for p in theirs.values()) > 1e-2
    torch.testing.assert_close(roles.value_head.weight.grad, value.score.weight.grad)
    frozen = [n for n, p in roles.named_parameters() if p.grad is not None]
    assert not [n for n in frozen if ".reward" in n or "reward_head" in n or "base_layer" in n]


def test_another_role_before_the_backward_is_refused(reward_folders: dict[str, Path]) -> None:
    roles = load_roles(smoke({"model.adapter": "lora"}).model, reward_folders["lora"], ())
    inputs, width, _ = batch()
    logps, _ = roles("policy", width=width, **inputs)
    with pytest.raises(RuntimeError, match="forward of role 'value' before backward of 'policy'"):
        roles("value", width=width, **inputs)
    with torch.no_grad():
        roles("policy", width=width, **inputs)
    logps.sum().backward()
    roles.after_backward()
    roles("value", width=width, **inputs)


def test_forbidden_tokens_have_no_probability_and_gradients_stay_numbers(
    reward_folders: dict[str, Path],
) -> None:
    roles = load_roles(smoke({"model.adapter": "full"}).model, reward_folders["full"], (5, 7))
    inputs, width, mask = batch()
    inputs["input_ids"][0, -width] = 5
    logps, entropy = roles("policy", width=width, entropy_gradient=True, **inputs)
    assert logps[0, 0] < -1e8 and (logps[1:] * mask[1:] > -50).all()
    (entropy * mask).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in roles.trainable_of("policy") if
               p.grad is not None)  # fmt: skip


def test_what_does_not_fit_is_refused(reward_folders: dict[str, Path], tmp_path: Path) -> None:
    lora, full = (smoke({"model.adapter": a}).model for a in ("lora", "full"))
    with pytest.raises(InputError, match="same model.adapter"):
        load_roles(lora, reward_folders["full"], ())
    with pytest.raises(InputError, match="same model.adapter"):
        load_roles(full, reward_folders["lora"], ())
    with pytest.raises(InputError, match="no reward model"):
        load_roles(full, tmp_path, ())
    other = smoke({"model.adapter": "lora", "model.lora_rank": 8}).model
    broken = tmp_path / "broken"
    import shutil

    shutil.copytree(reward_folders["lora"], broken)
    (broken / HEAD_FILE).unlink()
    with pytest.raises(InputError, match=f"{HEAD_FILE} is missing"):
        load_roles(other, broken, ())


# --- families, and the tower's outputs kept ----------------------------------------------------


def one_base(family: str) -> tuple[Roles, object]:
    vlm, processor = tiny(family)
    config = smoke({"model.adapter": "lora"}).model
    torch.manual_seed(0)
    peft = get_peft_model(copy.deepcopy(vlm), lora_config(vlm, config))
    for adapter in ("value", "reward"):
        peft.add_adapter(adapter, peft.peft_config["default"])
    shake(peft, 2)
    size = vlm.config.get_text_config().hidden_size
    heads = [nn.Linear(size, 1, bias=False) for _ in range(2)]
    return OneBase(peft, *heads, ()).eval(), processor


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_equals_its_rows_alone_with_and_without_the_cache(family: str) -> None:
    roles, processor = one_base(family)
    prompts, answers = answered(processor, 3)
    pad, cpu = processor.tokenizer.pad_token_id, torch.device("cpu")
    together = batch_of(prompts, answers, pad, cpu)
    width = max(map(len, answers))
    vlm = roles.vlm_of("policy")
    cache = TowerCache(vlm, roles.towers())
    for role in ("policy", "reference", "value", "reward"):
        (whole, *_) = roles(role, width=width, **together)
        with cache.rollout():
            for _ in range(2):  # computed, then taken from the cache
                with cache.rows([0, 1, 2], together):
                    (kept, *_) = roles(role, width=width, **together)
                torch.testing.assert_close(kept, whole, atol=1e-6, rtol=1e-6)
            some = batch_of([prompts[2], prompts[0]], [answers[2], answers[0]], pad, cpu)
            with cache.rows([2, 0], some):
                (other, *_) = roles(role, width=max(len(answers[2]), len(answers[0])), **some)
        for n, i in enumerate((2, 0)):
            alone = batch_of([prompts[i]], [answers[i]], pad, cpu)
            (own, *_) = roles(role, width=len(answers[i]), **alone)
            for batched in (whole[i], other[n]):
                cut = batched[: len(own[0])] if own.ndim > 1 else batched
                torch.testing.assert_close(cut, own[0], atol=1e-4, rtol=1e-4)
    assert (cache.hits > 0) == cache.works == (family in ("llava", "llava_next"))


@torch.no_grad()
def test_the_cache_gives_each_row_its_own_picture() -> None:
    roles, processor = one_base("llava")
    prompts, answers = answered(processor, 3)
    pad, cpu = processor.tokenizer.pad_token_id, torch.device("cpu")
    cache = TowerCache(roles.vlm_of("policy"), roles.towers())
    inputs = batch_of(prompts, answers, pad, cpu)
    with cache.rollout():
        with cache.rows([0, 1, 2], inputs):
            (right, *_) = roles("reward", **inputs)
        with cache.rows([1, 2, 0], inputs):
            (wrong, *_) = roles("reward", **inputs)
        assert not torch.allclose(right, wrong, atol=1e-4)
        with pytest.raises(AssertionError, match="the tower got"), cache.rows([0, 1], inputs):
            roles("reward", **inputs)
    (plain, *_) = roles("reward", **inputs)
    torch.testing.assert_close(plain, right)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@torch.no_grad()
def test_costs_are_the_reward_models_own_and_are_computed_only_if_asked(
    adapter: str, reward_folders: dict[str, Path], tmp_path: Path
) -> None:
    config = smoke({"model.adapter": adapter}).model
    with pytest.raises(InputError, match="has no cost head, which ppo.cost_limit needs"):
        load_roles(config, reward_folders[adapter], (), with_cost=True)
    write_reward_model(tmp_path, adapter, with_cost=True)
    inputs, _, _ = batch()
    expected = load_reward_model(config, tmp_path)(costs=True, **inputs)
    roles = load_roles(config, tmp_path, (), with_cost=True).eval()
    torch.testing.assert_close(roles("reward", **inputs), expected, atol=1e-5, rtol=1e-5)
    trained = [p for role in ("policy", "value") for p in roles.trainable_of(role)]
    assert not roles.cost_head.weight.requires_grad
    assert not any(p is roles.cost_head.weight for p in trained)
    assert len(load_roles(config, tmp_path, ())("reward", **inputs)) == 1
