"""Model families: what this package must know about a model beyond what transformers says.

Any image-text-to-text model of transformers loads and trains without an entry here. An entry names
the model's parts if they have uncommon names, corrects the model's processor, and says which
speed-ups give equal results. To add an entry, subclass `Family` and register the subclass under the
config's `model_type`:

    @register_family("my_vlm")
    class MyVLM(Family):
        tower = ("image_encoder",)

A separate package declares its subclass as an entry point in the group `spavl.families`. The entry
point is imported before a model is loaded, so its module can also add classes to transformers' Auto
classes.
"""

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, ProcessorMixin

from spavl_lib.config.registry import Registry
from spavl_lib.data.templates import VICUNA_V1
from spavl_lib.errors import InputError


class Family:
    """A family without an entry: its parts have the names that are common in transformers."""

    tower: tuple[str, ...] = ("vision_tower", "vision_model", "visual")
    """Names of the vision tower's module. It never trains and is never quantised."""
    projector: tuple[str, ...] = ("multi_modal_projector", "connector", "merger")
    """Names of the module between tower and language model. It is trained without LoRA."""
    shares_prefixes: bool = False
    """Whether a packed row was shown to give the same numbers as separate rows. The backbone needs
    a `language_model` or `text_model` with rotary positions, and `get_image_features`."""
    decodes_compactly: bool = False
    """Whether `generation.compact_decoding` was shown to give the responses of `generate`. It
    counts positions one by one."""
    picks_hidden_states: bool = False
    """Whether the model reads only the tower's hidden states at `config.vision_feature_layer`. If
    so, stored hidden states can replace a run of the tower."""
    refused: str = ""
    """Why models of the family are refused before anything is loaded; empty if accepted."""

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin) -> ProcessorMixin:
        """Correct the processor. A processor of another family is returned unchanged."""
        return processor

    @classmethod
    def tower_inputs(cls, config: Any, batch: dict[str, Tensor], rows: int) -> list[int]:
        """The number of tower inputs for each image: one, or all tiles of the image.

        Args:
            config: The model's config.
            batch: Image tensors of the batch.
            rows: Number of images.
        """
        return [1] * rows

    @classmethod
    def part_of(cls, name: str) -> str:
        """The part (tower, projector, head or language) that holds the parameter `name`."""
        for part, pattern in (
            ("projector", _pattern(cls.projector)),
            ("tower", _pattern(cls.tower)),
            ("head", _pattern(("lm_head",))),
        ):
            if pattern.search(name):
                return part
        return "language"

    @classmethod
    def not_quantised(cls) -> str:
        """A pattern for the full names of tower and projector, which stay in 16 bits.

        transformers matches the pattern from the start of a module's full name. A bare
        "vision_tower" would match no module, and the tower would be quantised without a warning.
        """
        return rf"(?:.*\.)?(?:{'|'.join((*cls.tower, *cls.projector))})"


@functools.cache
def _pattern(names: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"(^|\.)({'|'.join(names)})\.")


# Towers that put the patches of all images of a batch into one row. The output of such a tower is
# not divided by image.
PACKED_TOWERS = ("pixtral",)


def packs_images(config: Any) -> bool:
    """Whether the model's tower is one of `PACKED_TOWERS`. A LLaVA model may have any tower."""
    return getattr(getattr(config, "vision_config", None), "model_type", "") in PACKED_TOWERS


FAMILIES: Registry[type[Family]] = Registry("model family", "spavl.families", "model.name")
register_family = FAMILIES.register


def family_of(model: nn.Module | Any) -> type[Family]:
    """The family of a model or of a config; `Family` itself if the model type has no entry.

    Args:
        model: A config, or a model with or without wrappers.
    """
    if isinstance(model, nn.Module):
        inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        model = getattr(inner, "config", None)
    return FAMILIES.known.get(getattr(model, "model_type", ""), Family)


def tower_of(model: nn.Module) -> nn.Module:
    """The vision tower of a model.

    Raises:
        InputError: No module has one of the family's names for a tower.
    """
    names = family_of(model).tower
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in names:
            return module
    raise InputError(f"{type(model).__name__}: no vision tower ({', '.join(names)})")


# --- LLaVA ----------------------------------------------------------------------------------------


@register_family("llava")
class Llava(Family):
    """LLaVA-1.5."""

    shares_prefixes = picks_hidden_states = decodes_compactly = True

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin) -> ProcessorMixin:
        """Make the processor of the Hub's LLaVA-1.5 prepare rows as the authors' code does.

        The Hub's conversion crops the image to its middle, and leaves out the system sentence, BOS
        and EOS. A processor with any other chat template is returned unchanged.
        """
        from transformers import LlavaProcessor

        images = processor.image_processor
        if type(processor) is not LlavaProcessor or not (
            _of_the_hub(processor)
            if processor.chat_template
            else processor.tokenizer.get_vocab().keys() >= {"<s>", "</s>", "<unk>", "<image>"}
        ):
            return processor
        before = "the Hub's, without the system sentence" if processor.chat_template else "missing"
        processor.chat_template = VICUNA_V1
        said = f"its chat template is {before}; LLaVA-1.5's own (vicuna_v1) is used"
        if getattr(images, "do_center_crop", False):
            processor.image_processor = llava_images(
                images.crop_size["height"], images.image_mean, images.image_std
            )
            said += ", and images are padded to a square as in LLaVA-1.5's own code, not cropped"
            said += ", unless model.image_aspect is set"
        warnings.warn(f"{processor.tokenizer.name_or_path}: {said}", stacklevel=2)
        return processor


@register_family("llava_next")
class LlavaNext(Family):
    """LLaVA-NeXT, which cuts large images into tiles."""

    shares_prefixes = picks_hidden_states = decodes_compactly = True

    @classmethod
    def tower_inputs(cls, config: Any, batch: dict[str, Tensor], rows: int) -> list[int]:
        """The number of tiles of each image.

        Args:
            config: The model's config.
            batch: The collated batch, with `image_sizes`.
            rows: Number of images.
        """
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return [
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            for size in batch.get("image_sizes", ())
        ]


@register_family("paligemma")
class PaliGemma(Family):
    """PaliGemma 1 and 2."""

    shares_prefixes = True
    refused = (
        "PaliGemma sees its prompt in both directions and has no chat template, so the batches "
        "here do not fit it"
    )


@register_family("mllama")
class Mllama(Family):
    """Llama 3.2 Vision."""

    refused = (
        "Mllama takes images by cross attention with a mask for every token, which the batches "
        "here do not hold"
    )


class Sharing(Family):
    """Families with common names of their parts, in which tests showed sharing to be exact."""

    shares_prefixes = True


for _model_type in (
    "aya_vision", "cohere2_vision", "deepseek_vl", "gemma3", "gemma4", "glm46v", "glm4v",
    "idefics2", "idefics3", "internvl", "llava_onevision", "mistral3", "qwen2_5_vl", "qwen2_vl",
    "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava",
):  # fmt: skip
    register_family(_model_type)(Sharing)


def _of_the_hub(processor: ProcessorMixin) -> bool:
    """Whether the chat template writes turns as the template of llava-hf/llava-1.5-7b-hf does."""
    first = [{"type": "image"}, {"type": "text", "text": "One?"}]
    turns = [("user", first), ("assistant", [{"type": "text", "text": "Two."}]),
             ("user", [{"type": "text", "text": "Three?"}])]  # fmt: skip
    try:
        text = processor.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
    except (ValueError, TypeError, TemplateError):
        return False
    return text.split() == "USER: <image> One? ASSISTANT: Two. USER: Three? ASSISTANT:".split()


def set_image_aspect(processor: ProcessorMixin, aspect: str) -> None:
    """Apply the setting `model.image_aspect` to a processor of LLaVA-1.5.

    Args:
        processor: The processor; changed in place.
        aspect: auto, pad or square. auto changes nothing.

    Raises:
        InputError: `aspect` is not auto, and the model is not a LLaVA-1.5 with a square input.
    """
    from transformers import LlavaProcessor

    if aspect == "auto":
        return
    images = processor.image_processor
    crop = getattr(images, "crop_size", None)
    if type(processor) is not LlavaProcessor or not crop:
        raise InputError(
            f"model.image_aspect = {aspect!r} is only for LLaVA-1.5, but this model has a "
            f"{type(processor).__name__} with a {type(images).__name__}; set it to auto"
        )
    processor.image_processor = llava_images(
        crop["height"], images.image_mean, images.image_std, pad=aspect == "pad"
    )


def llava_images(
    side: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    pad: bool = True,
) -> BaseImageProcessor:
    """The image processor of LLaVA-1.5.

    Args:
        side: Height and width of the model's input, in pixels.
        mean: Mean of each channel; None for CLIP's.
        std: Standard deviation of each channel; None for CLIP's.
        pad: As in the LLaVA authors' code, pad images to a square with the mean colour, then
            resize. False: as in CLIP, resize the shorter edge, then crop the image to its middle.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    square = {"height": side, "width": side}
    statistics = {"image_mean": mean, "image_std": std}
    given = {name: list(values) for name, values in statistics.items() if values is not None}
    if not pad:
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **given)
    return LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size=square, crop_size=square, default_to_square=True,
        **given,
    )  # fmt: skip
