"""Models and processors by name, in the precision the hardware has.

Any `AutoModelForImageTextToText` loads here: the embedded model, a local folder, a hub id. No code
from a model's folder runs, and weights are safetensors only.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from spavl_lib.config import ModelConfig
from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.errors import InputError
from spavl_lib.modelling.speed.host import (
    LARGE_BYTES,
    SMALLER_BYTES,
    return_freed_memory,
    settle_threads,
)
from spavl_lib.runs.files import sha256_file

# Tower and projector by any family's name. transformers matches from the start of a module's full
# name: a bare "vision_tower" matches nothing, and the tower would be quantised without a word.
NOT_QUANTISED = (
    r"(?:.*\.)?(?:vision_tower|vision_model|visual|multi_modal_projector|connector|merger)"
)

# What of a model's folder decides its numbers: weights, sizes, words, template, pictures' sizes.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
BASE_FILE = "base.json"  # beside a trained adapter: which base it belongs to


def quiet_libraries() -> None:
    """Silence what libraries say that a reader can do nothing about."""
    transformers_logging.disable_progress_bar()
    # transformers' own renaming, which trl and peft have yet to follow
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated")


def model_path(config: ModelConfig) -> str:
    """Where the model's files are: the package's assets, a folder, or a hub id."""
    return str(ASSETS / "model") if config.name == "embedded" else config.name


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype:
    """bf16 or fp16 by what the GPU can do; fp32 on the CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def autocast() -> torch.autocast:
    """Products in `compute_dtype`, whatever the weights are kept in."""
    dtype = compute_dtype()
    return torch.autocast(device().type, dtype=dtype, enabled=dtype != torch.float32)


def load_processor(config: ModelConfig) -> ProcessorMixin:
    """The model's processor.

    Raises:
        InputError: There is none at that name.
    """
    try:
        processor = AutoProcessor.from_pretrained(
            model_path(config), revision=config.revision or None
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load a processor for model {config.name!r}: {why(error)}"
        ) from error
    processor.tokenizer.padding_side = "left"
    return as_llava(processor)


def llava_pictures(side: int) -> BaseImageProcessor:
    """Pictures as LLaVA-1.5's own code makes them: padded to a square with the mean colour."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    square = {"height": side, "width": side}
    return LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size=square, crop_size=square, default_to_square=True
    )


def as_llava(processor: ProcessorMixin) -> ProcessorMixin:
    """LLaVA-1.5's processor as its own code prepares rows; another family's unchanged.

    The Hub's processor cuts the picture's middle out and leaves the system sentence away.
    """
    from transformers import LlavaProcessor

    pictures = processor.image_processor
    # Pixtral wears LLaVA's processor too, and has pictures of its own.
    if type(processor) is not LlavaProcessor or not hasattr(pictures, "do_center_crop"):
        return processor
    if pictures.do_center_crop:
        side = pictures.crop_size["height"]
        processor.image_processor = llava_pictures(side)
        template = ASSETS / "model" / "chat_template.jinja"
        processor.chat_template = template.read_text(encoding="utf-8")
    return processor


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The base model, in evaluation mode, 4-bit for QLoRA.

    Raises:
        InputError: There is none at that name, or it takes no images.
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
            llm_int8_skip_modules=[NOT_QUANTISED, "lm_head"],
        )
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            model_path(config),
            revision=config.revision or None,
            dtype=compute_dtype(),
            use_safetensors=True,
            quantization_config=quantisation,
            **_straight_to_gpu(),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load model {config.name!r}: {why(error)}") from error
    # Loading under ZeRO-3 remembers renamings that were never made, and saving would undo them.
    if renamings := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [r for r in renamings if r.was_used()]
    if quantisation is not None:
        from spavl_lib.modelling.adapters import assert_four_bit

        assert_four_bit(model)
        _without_inference_weights(model)
        return model.eval()
    return model.eval() if hasattr(model, "hf_device_map") else model.to(device()).eval()


def _without_inference_weights(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs that have bf16 instructions.

    Its linears do so in the first evaluation pass, for good: scales are rounded to bf16, and from
    then on a product has no gradient, in training either.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _straight_to_gpu() -> dict[str, Any]:
    """Tensor by tensor to where they belong: a whole 7B does not fit Colab's 12.7 GB of RAM."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not torch.cuda.is_available() or is_deepspeed_zero3_enabled():
        return {}
    return {"device_map": {"": torch.cuda.current_device()}}


def why(error: BaseException) -> str:
    """What a failed load of a model comes to, and what to do; the library's words where unknown."""
    from huggingface_hub import errors

    chain = [error]
    while chain[-1].__cause__ is not None and len(chain) < 6:
        chain.append(chain[-1].__cause__)
    for link in chain:
        if isinstance(link, errors.GatedRepoError):
            return "gated: accept its terms on its page, then `hf auth login`"
        if isinstance(link, errors.RevisionNotFoundError):
            return "no such revision (model.revision)"
        if isinstance(link, errors.RepositoryNotFoundError):
            return "no such model on the Hub, or no right to see it; or name a local folder"
    text = str(error)
    if any(isinstance(e, errors.LocalEntryNotFoundError | ConnectionError) for e in chain) or (
        "offline mode" in text or "couldn't connect" in text
    ):
        return "the Hub cannot be reached and no copy is cached; set model.name to a local folder"
    if "Unrecognized configuration class" in text:
        kind = text.split("configuration class ")[1].split(" ")[0].rsplit(".", 1)[-1].strip("'>")
        return f"{kind} takes no images: a vision-language model is needed"
    return text


def load_policy(config: ModelConfig, trained: Path | None = None) -> PreTrainedModel:
    """A model for inference: the base, or what a trainer saved.

    Args:
        config: Of the base.
        trained: A trainer's `model/`: a PEFT adapter over the base, or a whole model.

    Raises:
        InputError: The folder is neither, or its adapter belongs to another base.
    """
    if trained is None:
        return load_model(config)
    if (trained / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel

        made_on = PeftConfig.from_pretrained(trained).base_model_name_or_path or ""
        if Path(made_on).name != Path(model_path(config)).name:
            raise InputError(f"{trained} is an adapter of {made_on}, not of {model_path(config)}")
        _check_base(trained / BASE_FILE, config)
        return PeftModel.from_pretrained(load_model(config), trained).eval()
    if not (trained / "config.json").is_file():
        raise InputError(f"{trained} holds neither an adapter nor a model")
    import dataclasses

    return load_model(dataclasses.replace(config, name=str(trained), adapter="full", revision=""))


def _check_base(description: Path, config: ModelConfig) -> None:
    """An adapter over other weights of the same name gives other answers, and no error."""
    if not description.is_file():
        return
    made_on = json.loads(description.read_text(encoding="utf-8"))["files"]
    here = model_hashes(config)
    changed = [k for k in sorted(made_on.keys() & here.keys()) if made_on[k] != here[k]]
    if changed:
        raise InputError(
            f"{description.parent} is an adapter over another state of {config.name!r}: "
            f"{', '.join(changed)} changed since; use the base it was trained on, or train it anew"
        )


def weights_sha256(config: ModelConfig) -> dict[str, str]:
    """Hashes of a local model's weight files, empty for a hub id."""
    folder = Path(model_path(config))
    if not folder.is_dir():
        return {}
    return {p.name: sha256_file(p) for p in sorted(folder.glob("*.safetensors"))}


def model_hashes(config: ModelConfig) -> dict[str, str]:
    """Hash of every file of a local model that decides its numbers; of a hub id, its commit."""
    folder = Path(model_path(config))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(config.name, "config.json", revision=config.revision or None)
        commit = Path(found).parent.name if isinstance(found, str) else config.revision
        return {"commit": commit} if commit else {}
    files = [p for p in sorted(folder.iterdir()) if p.suffix in MODEL_FILES and p.is_file()]
    return {p.name: sha256_file(p) for p in files}
