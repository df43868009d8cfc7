"""The model `laptop`: a LLaVA over SmolLM2-135M-Instruct, with a vision tower for 64-pixel images.

SmolLM2's weights come from the cache (`smollm2.py`). What was trained here, which is the tower, the
projector and adapters of the language model, lies in this package as one file in int8, the trained
part. `assemble` joins the two, and writes an ordinary folder into the cache, which transformers
loads without this package.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.data.sources.laptop_pairs import COMMAND
from spavl_lib.data.templates import content_with_images
from spavl_lib.errors import InputError
from spavl_lib.modelling import smollm2
from spavl_lib.modelling.processors import square_llava_processor
from spavl_lib.runs.cached import fault_of, making
from spavl_lib.runs.files import let_others_read, sha256_file, writing
from spavl_lib.runs.paths import cache_root
from spavl_lib.runs.provenance import canonical_sha256

TRAINED = ASSETS / "laptop"  # the trained part and its card
PART, CARD = "trained.safetensors", "README.md"
TRAIN_COMMAND = "python -m spavl_lib.trainers.laptop_base"
IMAGE_SIZE, PATCH_SIZE = 64, 16  # pixels
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
LORA_A, LORA_B, SCALE = ".lora_A", ".lora_B", ".scale"
FACTS = "facts"  # key of the file's metadata
# SmolLM2's template adds up strings. This macro makes a string of a message with an image.
CONTENT = (
    "{% macro content(message) %}" + content_with_images(smollm2.IMAGE_TOKEN) + "{% endmacro %}"
)
FORM = "1"  # raise it when the code below assembles another folder from the same parts


def laptop_folder() -> Path:
    """The assembled model's folder in the cache.

    Raises:
        InputError: The model was not assembled from this version's parts, or nothing was trained.
    """
    folder = cache_root() / "laptop"
    if fault := fault_of(folder, sources()):
        raise InputError(f"model 'laptop' is not ready ({fault}); run `{COMMAND}`")
    return folder


def sources() -> dict[str, str]:
    """What the assembled folder is made from.

    Raises:
        InputError: This checkout has no trained part, or the part has no card.
    """
    for name, path in (("trained part", TRAINED / PART), ("card", TRAINED / CARD)):
        if not path.is_file():
            raise InputError(
                f"model 'laptop' has no {name} in {TRAINED}; make it with `{TRAIN_COMMAND}`"
            )
    form = canonical_sha256([FORM, CONTENT, IMAGE_SIZE, PATCH_SIZE])
    return smollm2.sources() | {
        "part": sha256_file(TRAINED / PART), "card": sha256_file(TRAINED / CARD), "form": form
    }  # fmt: skip


def assemble() -> tuple[Path, bool]:
    """Write the model's folder into the cache, unless it is there and every file has its hash.

    Returns:
        The folder, and whether it was made now.

    Raises:
        InputError: SmolLM2 was not fetched, or there is no trained part, or the two do not fit.
        DiskError: There is too little room, or no permission to write.
        BusyError: Another process is making the folder.
    """
    folder, parts = cache_root() / "laptop", sources()
    if not fault_of(folder, parts, hashes=True):
        return folder, False
    base = smollm2.smollm2_folder()
    needed = (base / "model.safetensors").stat().st_size + 20_000_000
    with making(folder, parts, needed) as temporary:
        write_folder(temporary, base, TRAINED / PART)
        shutil.copy(TRAINED / CARD, temporary)
        let_others_read(temporary)
    return folder, True


def write_folder(folder: Path, base: Path, part: Path) -> None:
    """Write the whole model in fp16 and its processor, as transformers loads them.

    Args:
        folder: The folder to write to.
        base: SmolLM2's folder.
        part: File of the trained part.

    Raises:
        InputError: The file is damaged, or belongs to another base.
    """
    model, processor = load(base, part)
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


# --- model and processor --------------------------------------------------------------------------


def chat_template(own: str) -> str:
    """SmolLM2's chat template with a slot for an image before the text of a message.

    Args:
        own: SmolLM2's template. It reads a message's content as a string.
    """
    return CONTENT + own.replace("message['content']", "content(message)")


def build_processor(base: Path) -> LlavaProcessor:
    """The processor: SmolLM2's tokenizer, and images padded to a square of 64 pixels.

    Args:
        base: SmolLM2's folder.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    template = chat_template(tokenizer.chat_template)
    tokenizer.chat_template = template
    return square_llava_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE, template)


def build_model(base: Path, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """SmolLM2 with a random tower and projector, in fp32. Random numbers are torch's.

    Args:
        base: SmolLM2's folder.
        processor: The result of `build_processor`.
    """
    language = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        attention_dropout=0.0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(smollm2.IMAGE_TOKEN),
        vision_feature_layer=-1,  # LLaVA-1.5 uses -2, but this tower has only six layers
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def load(base: Path, part: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The whole model in fp32 with its adapters merged, and its processor.

    Args:
        base: SmolLM2's folder.
        part: File of the trained part.

    Raises:
        InputError: The file is damaged, or belongs to another base.
    """
    tensors, facts = read_part(part)
    if facts.get("base") != smollm2.PINNED.weights:
        raise InputError(f"{part} was trained over other weights of SmolLM2; run `{TRAIN_COMMAND}`")
    processor = build_processor(base)
    model = build_model(base, processor)
    apply_part(model, tensors, float(facts["lora_scale"]), part)
    return model, processor


# --- the trained part -----------------------------------------------------------------------------


def is_trained(name: str) -> bool:
    """Whether a parameter of the model lies in the trained part as it is, outside of adapters."""
    return name.startswith(("model.vision_tower.", "model.multi_modal_projector."))


def apply_part(
    model: LlavaForConditionalGeneration, tensors: dict[str, Tensor], scale: float, source: Path
) -> None:
    """Load tower and projector, and add the adapters to the language model's weights.

    Args:
        model: The result of `build_model`; changed in place.
        tensors: Parameter name -> tensor; for an adapted layer `LAYER.lora_A` (rank, inputs) and
            `LAYER.lora_B` (outputs, rank).
        scale: Factor of the adapters, alpha / rank.
        source: Where the tensors come from, for the message.

    Raises:
        InputError: A tensor is missing or unexpected, or has another shape.
    """
    parameters = dict(model.named_parameters())
    expected = {name for name in parameters if is_trained(name)}
    adapters = {name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)}
    expected |= {layer + side for layer in adapters for side in (LORA_A, LORA_B)}
    if expected != tensors.keys():
        wrong = sorted(expected ^ tensors.keys())
        raise InputError(f"{source} does not fit the model: {len(wrong)} names differ {wrong[:3]}")
    try:
        with torch.no_grad():
            for name in sorted(filter(is_trained, tensors)):
                parameters[name].copy_(tensors[name])
            for layer in sorted(adapters):
                update = tensors[layer + LORA_B] @ tensors[layer + LORA_A]
                parameters[f"{layer}.weight"].add_(update, alpha=scale)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{source} does not fit the model: {error}") from error


def write_part(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write the trained part: matrices in int8 with a scale for each row, all else in fp16.

    Args:
        path: The file.
        tensors: Name -> tensor. Position embeddings are no matrix products, and stay in fp16.
        facts: Text values that the file also holds.

    Raises:
        DiskError: There is no space or no permission.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().float()
        if tensor.ndim != 2 or "position" in name:
            stored[name] = tensor.to(torch.float16).contiguous()
            continue
        scale = tensor.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        stored[name] = (tensor / scale).round().to(torch.int8).contiguous()
        stored[name + SCALE] = scale
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, sum(t.nbytes for t in stored.values())):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # safetensors writes several values in a random order, and the file would differ.
            save_file(stored, temporary, metadata={FACTS: json.dumps(facts, sort_keys=True)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        let_others_read(path.parent)


def read_part(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_part` wrote.

    Args:
        path: The file.

    Returns:
        Name -> tensor in fp32, and the text values.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()[FACTS])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); get the file again") from error
    tensors = {
        name: tensor.float() * stored.get(name + SCALE, 1)
        for name, tensor in stored.items()
        if not name.endswith(SCALE)
    }
    return tensors, facts
