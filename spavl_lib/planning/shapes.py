"""Sizes of a model. They are counted on the meta device, so no weights are loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
)

from spavl_lib.config import ModelConfig
from spavl_lib.errors import InputError
from spavl_lib.modelling.families import family_of
from spavl_lib.modelling.load import architecture


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32064,
        "max_position_embeddings": 4096,
    }  # fmt: skip


# Sizes of well-known models, so that a plan needs no network.
KNOWN = {
    "llava-hf/llava-1.5-7b-hf": _llama(4096, 11008, 32, 32),
    "llava-hf/llava-1.5-13b-hf": _llama(5120, 13824, 40, 40),
}


def model_config(config: ModelConfig) -> PreTrainedConfig:
    """The transformers config of a known model, a local folder, or a Hub id.

    Raises:
        InputError: The model is not known, and its config cannot be loaded.
    """
    if config.name in KNOWN:
        return LlavaConfig(text_config=LlamaConfig(**KNOWN[config.name]))
    try:
        return architecture(config)
    except InputError as error:
        raise InputError(f"{error} (these models need no Hub: {', '.join(KNOWN)})") from error


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide memory and time. Counts are numbers of values, not bytes."""

    parts: dict[str, int]
    """Values by part: tower, projector, language, head."""
    linears: int
    """Values in the language model's linear layers, which QLoRA stores in 4 bits."""
    lora_inputs: int
    """Input width plus output width, summed over the adapted linear layers. Multiplied by the rank
    this is the number of LoRA's values."""
    layers: int
    """Decoder layers of the language model."""
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width inside an MLP."""
    kv_width: int
    """Width of one layer's keys, which is also the width of its values."""
    heads: int
    """Attention heads for queries."""
    vocabulary: int
    """Number of token ids that have a logit."""
    context: int
    """Largest number of tokens of a sequence; 0 if the config does not say."""
    image_tokens: int
    """Tokens that an image adds to a row."""
    tower_tokens: int
    """Patches of an image in the vision tower, plus its class token."""


def shape_of(config: PreTrainedConfig, targets: tuple[str, ...]) -> Shape:
    """Count the sizes of a model on the meta device.

    Args:
        config: The model's transformers config.
        targets: Names of the linear layers that get adapters.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    family = family_of(config)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = family.part_of(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    linears = lora = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and family.part_of(f"{name}.weight") == "language":
            linears += module.weight.numel()
            if name.rsplit(".", 1)[-1] in targets:
                lora += module.in_features + module.out_features
    text, vision = config.get_text_config(), config.vision_config
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    patches = (getattr(vision, "image_size", 336) // vision.patch_size) ** 2
    return Shape(
        parts=parts,
        linears=linears,
        lora_inputs=lora,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        kv_width=width * (getattr(text, "num_key_value_heads", None) or heads),
        heads=heads,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None) or 0,
        image_tokens=getattr(config, "image_seq_length", None) or patches,
        tower_tokens=patches + 1,
    )
