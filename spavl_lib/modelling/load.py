"""Load models and processors by name, in the best precision of the hardware.

Any `AutoModelForImageTextToText` loads here: the embedded model, `laptop`, a local folder, or a Hub
id. No code from a model's folder is run, and weights are read from safetensors only.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from spavl_lib import machine
from spavl_lib.config import ModelConfig
from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import assert_four_bit
from spavl_lib.modelling.families import FAMILIES, family_of, set_image_aspect
from spavl_lib.modelling.processors import check_template, complete, read_processor
from spavl_lib.modelling.speed.host import (
    LARGE_BYTES,
    SMALLER_BYTES,
    return_freed_memory,
    settle_threads,
)
from spavl_lib.runs.files import sha256_file

# Endings of the files that a model's outputs depend on: weights, configs, tokenizer, template.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
BASE_FILE = "base.json"  # lies beside a trained adapter, and describes the adapter's base model


def quiet_libraries() -> None:
    """Silence progress bars, and a warning that users can do nothing about."""
    transformers_logging.disable_progress_bar()
    # transformers renamed this attribute; trl and peft still use the old name.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated")


def model_path(config: ModelConfig) -> str:
    """The model's folder or Hub id.

    The embedded model's folder lies inside this package, and that of `laptop` in the cache.

    Raises:
        InputError: The model is `laptop`, and it was not fetched.
    """
    if config.name == "laptop":
        from spavl_lib.modelling.laptop import laptop_folder

        return str(laptop_folder())
    return str(ASSETS / "model") if config.name == "embedded" else config.name


def device() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype:
    """The precision of matrix products, as `machine.dtype_name` decides it."""
    return getattr(torch, machine.DTYPES[machine.dtype_name()])


def autocast() -> torch.autocast:
    """A context that computes matrix products in `compute_dtype`, whatever the weights' dtype."""
    dtype = compute_dtype()
    return torch.autocast(device().type, dtype=dtype, enabled=dtype != torch.float32)


def rounding(dtype: torch.dtype | None = None) -> float:
    """Relative error that rounding may leave in a model's output, such as a score.

    Args:
        dtype: Precision of the matrix products; `compute_dtype` if not given.

    Returns:
        1e-4 in fp32. In 16 bits, four units in the last place of a number near 1: 0.03 in bf16 and
        0.004 in fp16. In a measurement in bf16, rounding the residual stream moved a score near 1
        by 1.2 such units.
    """
    dtype = dtype or compute_dtype()
    return 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def logit_rounding(dtype: torch.dtype | None = None) -> float:
    """Difference in nats that rounding may cause between one logit computed in two batches.

    Args:
        dtype: Precision of the matrix products; `compute_dtype` if not given.

    Returns:
        1e-4 in fp32. In 16 bits, twice the distance between neighbouring numbers in the range 16 to
        32, in which the logits of large language models lie: 0.25 in bf16, 0.03 in fp16.
    """
    dtype = dtype or compute_dtype()
    return 1e-4 if dtype == torch.float32 else 2 * 16 * torch.finfo(dtype).eps


def load_processor(config: ModelConfig) -> ProcessorMixin:
    """The model's processor, with the corrections of the model's family and padding on the left.

    Raises:
        InputError: The processor cannot be loaded.
    """
    try:
        model = _read_config(config)
        processor = read_processor(model_path(config), config.revision or None, model.model_type)
        complete(processor, model)
        for family in FAMILIES.known.values():
            processor = family.prepare_processor(processor)
        set_image_aspect(processor, config.image_aspect)
        check_template(processor)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load a processor for model {config.name!r}: {why(error)}"
        ) from error
    processor.tokenizer.padding_side = "left"
    return processor


def context_length(config: ModelConfig) -> int:
    """The model's context length in tokens; 0 if the model's config does not say.

    Raises:
        InputError: The config cannot be loaded.
    """
    text = architecture(config).get_text_config()
    return getattr(text, "max_position_embeddings", None) or 0


def architecture(config: ModelConfig) -> PreTrainedConfig:
    """The model's transformers config.

    Raises:
        InputError: The config cannot be loaded.
    """
    try:
        return _read_config(config)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the config of {config.name!r}: {why(error)}") from error


def _read_config(config: ModelConfig) -> PreTrainedConfig:
    """The model's transformers config.

    Raises:
        InputError: The model's family is refused.
        OSError: There is no config.
        ValueError: The config cannot be read.
    """
    FAMILIES.load_all()
    model = AutoConfig.from_pretrained(model_path(config), revision=config.revision or None)
    if reason := family_of(model).refused:
        raise InputError(f"model {config.name!r} cannot be used: {reason}")
    return model


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The base model in evaluation mode, in 4 bits for QLoRA.

    Raises:
        InputError: The model cannot be loaded, or takes no images.
    """
    quiet_libraries()
    settle_threads()
    if device().type == "cpu":
        return_freed_memory(SMALLER_BYTES if config.gradient_checkpointing else LARGE_BYTES)
    quantisation = None
    if config.adapter == "qlora":
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(),
            llm_int8_skip_modules=[family_of(architecture(config)).not_quantised(), "lm_head"],
        )
    try:
        _read_config(config)
        model = AutoModelForImageTextToText.from_pretrained(
            model_path(config),
            revision=config.revision or None,
            dtype=compute_dtype(),
            use_safetensors=True,
            quantization_config=quantisation,
            **straight_to_gpu(),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load model {config.name!r}: {why(error)}") from error
    # Under ZeRO-3, transformers also records renamings of weights that it did not apply. Saving the
    # model would reverse these renamings too.
    if renamings := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [r for r in renamings if r.was_used()]
    if quantisation is not None:
        assert_four_bit(model)
        _without_inference_weights(model)
        return model.eval()
    return model.eval() if hasattr(model, "hf_device_map") else model.to(device()).eval()


def _without_inference_weights(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs that have bf16 instructions.

    bitsandbytes repacks a linear layer in the layer's first forward pass in evaluation mode, and
    does not reverse it. Afterwards the scales are rounded to bf16, and the layer's product has no
    gradient, not even in training mode.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def straight_to_gpu() -> dict[str, Any]:
    """Options that load each tensor directly to the GPU.

    Loading through main memory would need more than Colab's 12.7 GB for a 7B model.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not torch.cuda.is_available() or is_deepspeed_zero3_enabled():
        return {}
    return {"device_map": {"": torch.cuda.current_device()}}


def why(error: BaseException) -> str:
    """Why a model could not be loaded, and what to do. Other errors keep the library's message."""
    from huggingface_hub import errors

    chain = [error]
    while chain[-1].__cause__ is not None and len(chain) < 6:
        chain.append(chain[-1].__cause__)
    for link in chain:
        if isinstance(link, errors.GatedRepoError):
            return "the model is gated; accept its terms on its page, then run `hf auth login`"
        if isinstance(link, errors.RevisionNotFoundError):
            return "it has no such revision; check model.revision"
        if isinstance(link, errors.RepositoryNotFoundError):
            return "the Hub has no such model, or you may not see it; or set a local folder"
    text = str(error)
    if any(isinstance(e, errors.LocalEntryNotFoundError | ConnectionError) for e in chain) or (
        "offline mode" in text or "couldn't connect" in text
    ):
        return "the Hub cannot be reached and no copy is cached; set model.name to a local folder"
    if "Unrecognized configuration class" in text:
        kind = text.split("configuration class ")[1].split(" ")[0].rsplit(".", 1)[-1].strip("'>")
        return f"{kind} takes no images; a vision-language model is needed"
    return text


def load_policy(config: ModelConfig, trained: Path | None = None) -> PreTrainedModel:
    """A model for inference: the base model or a trained model.

    Args:
        config: The base model.
        trained: A trainer's `model/`, which holds a PEFT adapter over the base or a complete model.
            None loads the base.

    Raises:
        InputError: `trained` holds neither, or its adapter belongs to another base.
    """
    if trained is None:
        return load_model(config)
    if (trained / "adapter_config.json").is_file():
        from peft import PeftModel

        check_adapter(trained, config)
        return PeftModel.from_pretrained(load_model(config), trained).eval()
    if not (trained / "config.json").is_file():
        raise InputError(f"{trained} holds neither an adapter nor a model")
    return load_model(dataclasses.replace(config, name=str(trained), adapter="full", revision=""))


def check_adapter(trained: Path, config: ModelConfig) -> None:
    """Refuse an adapter of another base: it would silently give other responses.

    Args:
        trained: The adapter's folder.
        config: The base model.

    Raises:
        InputError: The adapter names another base, or the base's files have changed.
    """
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(trained).base_model_name_or_path or ""
    if Path(base).name != Path(model_path(config)).name:
        raise InputError(f"{trained} is an adapter of {base}, not of {model_path(config)}")
    description = trained / BASE_FILE
    if not description.is_file():
        return
    trained_on = json.loads(description.read_text(encoding="utf-8"))["files"]
    current = model_hashes(config)
    changed = [k for k in sorted(trained_on.keys() & current.keys()) if trained_on[k] != current[k]]
    if changed:
        raise InputError(
            f"{trained} is an adapter over an earlier version of {config.name!r}: "
            f"{', '.join(changed)} changed since. Use the base it was trained on, or train it again"
        )


def weights_sha256(config: ModelConfig) -> dict[str, str]:
    """File name -> sha256 of a local model's weight files; empty for a Hub id."""
    folder = Path(model_path(config))
    if not folder.is_dir():
        return {}
    return {p.name: sha256_file(p) for p in sorted(folder.glob("*.safetensors"))}


def model_hashes(config: ModelConfig) -> dict[str, str]:
    """File name -> sha256 of each file that a local model's outputs depend on.

    For a Hub id the result is `commit` -> the model's commit, or empty if the commit is unknown.
    """
    folder = Path(model_path(config))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(
            config.name, "config.json", revision=config.revision or None
        )
        commit = Path(cached).parent.name if isinstance(cached, str) else config.revision
        return {"commit": commit} if commit else {}
    return folder_hashes(folder)


def folder_hashes(folder: str | Path) -> dict[str, str]:
    """File name -> sha256 of each file in a model's folder that the model's outputs depend on.

    The result is empty if there is no such folder.
    """
    folder = Path(folder)
    files = [p for p in sorted(folder.glob("*")) if p.suffix in MODEL_FILES and p.is_file()]
    return {p.name: sha256_file(p) for p in files}


def load_counter(name: str, max_length: int = 0) -> tuple[ProcessorMixin, int]:
    """The processor of a model, and the largest number of tokens that a sequence may have.

    Args:
        name: Model, as in the setting `model.name`.
        max_length: The limit in tokens. It cannot exceed the model's context length. 0 uses the
            context length.
    """
    config = ModelConfig(name=name, adapter="full")
    limits = filter(None, (max_length, context_length(config)))
    return load_processor(config), min(limits, default=0)
