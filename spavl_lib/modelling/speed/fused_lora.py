"""Add LoRA's product to the base layer's output in place, in one matrix product.

PEFT computes `result + lora_B(lora_A(x)) * scaling`, which writes three tensors of the layer's
output size to memory and one more in the backward pass. Here `addmm_` computes the product with
`lora_B`, scales it, and adds it to the base layer's output in place (Hu et al. 2021,
arXiv:2106.09685, equation 3). Results are equal up to rounding.

This needs inputs, base and adapter in the same dtype, without autocast: all fp32 or all bf16. Under
autocast, over a 4-bit base and under ZeRO-3, PEFT's forward runs.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional


def fuse_lora(model: nn.Module) -> Callable[[], None]:
    """Replace the forward of a model's LoRA layers by the in-place one.

    A replaced layer still runs PEFT's forward if the in-place form does not support its state or
    its input, for example under autocast.

    Args:
        model: A PEFT model, changed in place. A model without adapters is not changed.

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
    """The name of the active adapter; empty if the in-place form does not support the layer.

    The form supports one active adapter of plain LoRA that is not merged, and that has the same
    dtype as the layer and the input.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
        return ""
    [name] = active
    up, down = layer.lora_B[name], layer.lora_A[name]
    supported = (
        type(layer.base_layer) is nn.Linear
        and up.bias is None
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and x.dtype == layer.base_layer.weight.dtype == up.weight.dtype == down.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and not hasattr(up.weight, "ds_id")  # ZeRO-3 gathers a weight only when its layer is called
    )
    return name if supported else ""
