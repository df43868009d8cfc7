"""Add LoRA's product to the base layer's output in place, in one matrix product.

PEFT computes `result + lora_B(lora_A(x)) * scaling`, which writes three tensors of the layer's
output size to memory and one more in the backward pass. Here `addmm_` scales the second product and
adds it to the first (Hu et al. 2021, arXiv:2106.09685, equation 3). Results are equal up to
rounding. It applies if base and adapter have one dtype and nothing casts: fp32 on a CPU, or bf16
throughout. Under autocast, over a 4-bit base and under ZeRO-3, PEFT's forward runs.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional


def fuse_lora(model: nn.Module) -> Callable[[], None]:
    """Run LoRA layers in place where that is exact; elsewhere PEFT's forward runs.

    Args:
        model: A PEFT model, changed in place. A model without adapters stays as it is.

    Returns:
        A function that undoes the change.
    """
    layers = [m for m in model.modules() if type(m) is Linear and "forward" not in vars(m)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)

    def restore() -> None:
        for layer in layers:
            del layer.forward

    return restore


def _forward(self: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's output (..., out) for input `x` (..., in)."""
    name = _only_adapter(self, x)
    if not name or args or kwargs:
        return Linear.forward(self, x, *args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])
    down, up = functional.linear(rows, self.lora_A[name].weight), self.lora_B[name].weight
    result = self.base_layer(rows).addmm_(down, up.t(), alpha=self.scaling[name])
    return result.view(*x.shape[:-1], -1)


def _only_adapter(layer: Linear, x: Tensor) -> str:
    """The name of the active adapter, if it is the only one and plain LoRA in the layer's dtype."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
        return ""
    [name] = active
    up, down = layer.lora_B[name], layer.lora_A[name]
    exact = (
        type(layer.base_layer) is nn.Linear
        and up.bias is None
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and x.dtype == layer.base_layer.weight.dtype == up.weight.dtype == down.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and not hasattr(up.weight, "ds_id")  # ZeRO-3 gathers a weight only when its layer is called
    )
    return name if exact else ""
