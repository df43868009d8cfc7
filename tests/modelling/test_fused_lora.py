"""LoRA's products in place: the numbers of PEFT's own way, which runs where they would differ."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from spavl_lib.modelling.speed.fused_lora import fuse_lora


class Block(nn.Module):
    """Two linears with something between them that keeps its input for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def adapted(**changes: object) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | changes
    model = get_peft_model(Block(), LoraConfig(**settings))
    model.add_adapter("other", LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def numbers(model: PeftModel) -> list[Tensor]:
    """Output, and gradients of input and of whatever trains."""
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model.zero_grad()
    out = model(x.to(model.base_model.model.up.weight.dtype))
    out.square().sum().backward()
    return [out.detach(), x.grad] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture
def peft_calls(monkeypatch: pytest.MonkeyPatch) -> list[Linear]:
    """Layers that ran PEFT's own forward."""
    calls, own = [], Linear.forward

    def counted(self: Linear, *args: object, **kwargs: object) -> Tensor:
        calls.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", counted)
    return calls


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_outputs_and_gradients_are_peft_s(adapter: str, peft_calls: list) -> None:
    model = adapted().double()
    model.set_adapter(adapter)
    plain = numbers(model)
    assert len(peft_calls) == 2
    restore = fuse_lora(model)
    fuse_lora(model)  # twice is once
    fused = numbers(model)
    assert len(peft_calls) == 2, "not run in place"
    assert len(plain) == len(fused) == 6
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    restore()
    numbers(model)
    assert len(peft_calls) == 4


def both(model: PeftModel) -> None:
    model.base_model.set_adapter(["default", "other"])


def base_in_bf16(model: PeftModel) -> None:
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.base_layer.bfloat16()


CASES: dict[str, tuple[dict, Callable]] = {
    "two adapters": ({}, both),
    "merged": ({}, lambda m: m.merge_adapter()),
    "dropout": ({"lora_dropout": 0.5}, lambda m: None),
    "bias on B": ({"lora_bias": True}, lambda m: None),
    "DoRA": ({"use_dora": True}, lambda m: None),
    "half precision": ({}, lambda m: m.base_model.model.bfloat16()),
    "fp32 adapters over bf16": ({}, base_in_bf16),
}


@pytest.mark.parametrize("case", CASES)
def test_where_it_would_differ_peft_s_own_way_runs(case: str, peft_calls: list) -> None:
    settings, change = CASES[case]
    model = adapted(**settings)
    change(model)
    torch.manual_seed(2)
    plain, before = numbers(model), len(peft_calls)
    fuse_lora(model)
    torch.manual_seed(2)
    again = numbers(model)
    if case == "half precision":  # all of one precision: in place, rounded once less
        assert len(peft_calls) == before
        torch.testing.assert_close(again, plain, rtol=0.05, atol=0.5)
    else:
        assert len(peft_calls) == before + 2
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["adapter off", "autocast"])
def test_contexts_take_peft_s_own_way(how: str, peft_calls: list) -> None:
    model = adapted()
    fuse_lora(model)
    context = {
        "adapter off": model.disable_adapter,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[how]
    with context(), torch.no_grad():
        model(torch.ones(1, 12))
    assert len(peft_calls) == 2
    with torch.no_grad():
        model(torch.ones(1, 12))
    assert len(peft_calls) == 2, "in place again"
