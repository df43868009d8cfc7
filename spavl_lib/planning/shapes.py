"""What the planner plans with: devices by name, and a model's sizes counted on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch

from spavl_lib.config import ModelConfig
from spavl_lib.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator, or this machine's CPU."""

    name: str
    memory_gib: float
    """What a process may use, driver and CUDA context taken off."""
    tflops: float
    """Dense matmul peak in the training precision, from the maker's data sheet; CPU: measured."""
    bandwidth_gbs: float
    """Memory bandwidth, GB/s."""
    half: str = "bf16"
    """Its 16-bit type; "none" on the CPU."""


DEVICES = {
    "t4": Device("t4", 14.6, 65, 320, "fp16"),
    "l4": Device("l4", 22.0, 121, 300),
    "a100-40": Device("a100-40", 39.0, 312, 1555),
    "a100-80": Device("a100-80", 78.8, 312, 2039),
    "h100": Device("h100", 78.8, 989, 3350),
    "h200": Device("h200", 139.0, 989, 4800),
}
# Share of the peak that steps of this kind reach; rough, replaced by measured rates where they are.
UTILISATION = 0.35


def device_named(name: str) -> Device:
    """A device by name; `cpu` is this machine.

    Raises:
        InputError: Unknown, naming those there are.
    """
    if name == "cpu":
        from spavl_lib.machine import memory_bytes

        return Device("cpu", memory_bytes() / GIB, cpu_tflops(), 20, "none")
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r} (there are: cpu, {', '.join(DEVICES)})")
    return DEVICES[name]


def cpu_tflops() -> float:
    """This CPU's matmul rate in fp32, measured in a blink."""
    import time

    a = torch.randn(768, 768)
    a @ a
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 768**3 / (time.perf_counter() - started) / 1e12


# --- the model's shape --------------------------------------------------------------------------


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32064,
        "max_position_embeddings": 4096,
    }  # fmt: skip


# For planning without the Hub.
KNOWN = {
    "llava-hf/llava-1.5-7b-hf": _llama(4096, 11008, 32, 32),
    "llava-hf/llava-1.5-13b-hf": _llama(5120, 13824, 40, 40),
}


def model_config(config: ModelConfig) -> Any:
    """The architecture's config: of a known name, a folder, or the Hub.

    Raises:
        InputError: None of these.
    """
    from transformers import AutoConfig, LlamaConfig, LlavaConfig

    from spavl_lib.modelling.load import model_path, why

    if config.name in KNOWN:
        return LlavaConfig(text_config=LlamaConfig(**KNOWN[config.name]))
    try:
        return AutoConfig.from_pretrained(model_path(config), revision=config.revision or None)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the config of {config.name!r}: {why(error)} (known without the Hub: "
            f"{', '.join(KNOWN)})"
        ) from error


@dataclass(frozen=True)
class Shape:
    """What of a model decides memory and time; counts are values, not bytes."""

    parts: dict[str, int]
    """Values by part: tower, projector, language, head."""
    linears: int
    """Values in the language model's linears, which 4 bit takes."""
    lora_inputs: int
    """Sum over adapted linears of inputs plus outputs: adapters hold this times their rank."""
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    """Width of keys, and of values, in one layer."""
    heads: int
    vocabulary: int
    image_tokens: int
    tower_width: int
    tower_tokens: int
    tied: bool


def shape_of(config: Any, targets: tuple[str, ...]) -> Shape:
    """Count a model on the meta device.

    Args:
        config: Of transformers.
        targets: Names of the linears that take adapters.
    """
    from transformers import AutoModelForImageTextToText

    from spavl_lib.modelling.adapters import part_of

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts[part_of(name)] = parts.get(part_of(name), 0) + parameter.numel()
    linears = lora = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and part_of(f"{name}.weight") == "language":
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
        image_tokens=getattr(config, "image_seq_length", None) or patches,
        tower_width=vision.hidden_size,
        tower_tokens=patches + 1,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )
