"""What is kept of a frozen tower is dropped as soon as its output would be another."""

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.modelling.families import tower_of
from spavl_lib.modelling.speed.shared_prefix import backbone_of, share_prefix
from tests.helpers import embedded_model, embedded_processor, mini_rows, spread


def first_linear(tower: nn.Module) -> nn.Linear:
    return next(m for m in tower.modules() if isinstance(m, nn.Linear))


def load_others(model: nn.Module) -> None:
    tower = tower_of(model)
    tower.load_state_dict({k: v * 1.5 for k, v in tower.state_dict().items()})


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        first_linear(tower_of(model)).weight.mul_(3.0)


def through_data(model: nn.Module) -> None:
    first_linear(tower_of(model)).weight.data.mul_(3.0)


def flip_the_sign(model: nn.Module) -> None:
    first_linear(tower_of(model)).weight.data.neg_()


def other_memory(model: nn.Module) -> None:
    weight = first_linear(tower_of(model)).weight
    weight.data = weight.data * 3.0


def another_parameter(model: nn.Module) -> None:
    layer = first_linear(tower_of(model))
    layer.weight = nn.Parameter(layer.weight.detach() * 3.0, requires_grad=False)


def a_buffer(model: nn.Module) -> None:
    tower = tower_of(model)
    ids = next(b for n, b in tower.named_buffers() if "position_ids" in n)
    ids.copy_(ids.flip(-1))


def a_hook(model: nn.Module) -> None:
    first_linear(tower_of(model)).register_forward_hook(lambda module, inputs, output: output * 2)


def double(model: nn.Module) -> None:
    model.double()


CHANGES = (
    load_others, in_place, through_data, flip_the_sign, other_memory, another_parameter, a_buffer,
    a_hook, double,
)  # fmt: skip


def batch_of() -> dict[str, Tensor]:
    batch = PreferenceCollator(embedded_processor())(spread(mini_rows(), 3))
    return {k: v for k, v in batch.items() if k != "completion_mask"}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor], *, plain: bool = False) -> Tensor:
    if plain:
        handle = backbone_of(model)._shared_prefix
        handle.restore()
    out = model(**batch).logits[batch["attention_mask"].bool()].double()
    if plain:
        share_prefix(model, strict=True)
    return out


def compare(model: nn.Module, batch: dict[str, Tensor], before: Tensor) -> None:
    """The same pixel tensor again, after a change: as without anything kept."""
    after = logits(model, batch)
    expected = logits(model, batch, plain=True)
    scale = expected.std()
    assert (expected - before).abs().max() > 0.01 * scale, "the change shows"
    torch.testing.assert_close(after / scale, expected / scale, atol=1e-3, rtol=0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tower_computes_again(change: Callable[[nn.Module], None]) -> None:
    model, batch = embedded_model(own=True), batch_of()
    tower_of(model).requires_grad_(False)
    handle = share_prefix(model, strict=True)
    before = logits(model, batch)
    assert torch.equal(logits(model, batch), before)
    assert handle.vision.images_run == 3, "and nothing is computed twice while nothing changes"
    change(model)
    if change is double:
        assert logits(model, batch).dtype == torch.float64
        expected = logits(copy.deepcopy(model), batch, plain=True)
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-8, rtol=0)
        return
    compare(model, batch, before)


def adapted() -> PeftModel:
    """An adapter on the tower that does not train."""
    model = embedded_model(own=True)
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "vision_tower" in n
    ]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names))
    model.add_adapter("other", LoraConfig(r=4, target_modules=names))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False).eval()


def switched_off(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def another(model: PeftModel) -> None:
    model.set_adapter("other", inference_mode=True)


def scaled(model: PeftModel) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 4


@pytest.mark.parametrize("change", [switched_off, another, scaled])
def test_an_adapter_on_the_tower_counts(change: Callable[[PeftModel], None]) -> None:
    model, batch = adapted(), batch_of()
    share_prefix(model, strict=True)
    before = logits(model, batch)
    change(model)
    compare(model, batch, before)


def test_another_autocast_computes_again() -> None:
    model, batch = embedded_model(own=True).requires_grad_(False), batch_of()
    handle = share_prefix(model, strict=True)
    contexts = (
        contextlib.nullcontext(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autocast("cpu", dtype=torch.float16),
    )
    for number, context in enumerate(contexts, 1):
        with context:
            logits(model, batch)
            logits(model, batch)
        assert handle.vision.images_run == 3 * number


def test_other_pixels_in_the_same_memory_are_other_images() -> None:
    model, batch = embedded_model(own=True).requires_grad_(False), batch_of()
    pixels = batch["pixel_values"].numpy()  # shares memory; a change has no version
    batch["pixel_values"] = torch.from_numpy(pixels)
    share_prefix(model, strict=True)
    before = logits(model, batch)
    pixels *= -1
    compare(model, batch, before)
