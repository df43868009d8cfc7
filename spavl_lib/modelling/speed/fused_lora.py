"""LoRA's product added where the base layer's stands, in one matrix product.

PEFT writes `result + lora_B(lora_A(x)) * scaling`: three tensors of the layer's output size, each
written to memory and read again, and one more in the backward pass. Here the second product is
scaled and added to the first in place, by the matrix product itself. Hu et al. 2021
(arXiv:2106.09685), equation 3; equal up to rounding. Where base and adapter are of one precision
and nothing casts: fp32 on a CPU, or bf16 throughout. Under autocast, over 4 bit and under ZeRO-3
PEFT's own way runs.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional


def fuse_lora(model: nn.Module) -> Callable[[], None]:
    """Run a model's LoRA linears in place wherever that is exact; elsewhere PEFT's own way.

    Args:
        model: A PEFT model, or one without adapters, which stays as it is; changed in place.

    Returns:
        What takes it off again.
    """
    layers = [m for m in model.modules() if type(m) is Linear and "forward" not in vars(m)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)

    def restore() -> None:
        for layer in layers:
            del layer.forward

    return restore


def _forward(self: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(..., in) to (..., out)."""
    name = _only_adapter(self, x)
    if not name or args or kwargs:
        return Linear.forward(self, x, *args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])
    down, up = functional.linear(rows, self.lora_A[name].weight), self.lora_B[name].weight
    result = self.base_layer(rows).addmm_(down, up.t(), alpha=self.scaling[name])
    return result.view(*x.shape[:-1], -1)


def _only_adapter(layer: Linear, x: Tensor) -> str:
    """The one adapter that is on, if it is LoRA as published in the layer's own precision."""
    on = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(on) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
        return ""
    up, down = layer.lora_B[on[0]], layer.lora_A[on[0]]
    exact = (
        type(layer.base_layer) is nn.Linear
        and up.bias is None
        and isinstance(layer.lora_dropout[on[0]], nn.Identity)
        and x.dtype == layer.base_layer.weight.dtype == up.weight.dtype == down.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and not hasattr(up.weight, "ds_id")  # in pieces under ZeRO-3 until its layer is called
    )
    return on[0] if exact else ""
