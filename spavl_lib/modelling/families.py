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
from typing import Any

from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, ProcessorMixin

from spavl_lib.config.registry import Registry
from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.errors import InputError


class Family:
    """A family without an entry: its parts have the names that are common in transformers."""

    tower: tuple[str, ...] = ("vision_tower", "vision_model", "visual")
    """Names of the vision tower's module. It never trains and is never quantised."""
    projector: tuple[str, ...] = ("multi_modal_projector", "connector", "merger")
    """Names of the module between tower and language model. It is trained without LoRA."""
    shares_prefixes: bool = False
    """Whether a packed row was shown to give the same numbers as separate rows. The backbone needs
    a `language_model` with rotary positions, `get_image_features`, and `config.image_token_id`."""
    picks_hidden_states: bool = False
    """Whether the model reads only the tower's hidden states at `config.vision_feature_layer`. If
    so, stored hidden states can replace a run of the tower."""

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin) -> ProcessorMixin:
        """Correct the processor. A processor of another family is returned unchanged."""
        return processor

    @classmethod
    def tower_inputs(cls, config: Any, batch: dict[str, Tensor], rows: int) -> list[int]:
        """The number of tower inputs for each row: one image, or all tiles of one image.

        Args:
            config: The model's config.
            batch: Image tensors of the batch.
            rows: Rows that have an image.
        """
        return [1] * rows

    @classmethod
    def part_of(cls, name: str) -> str:
        """The part (tower, projector, head or language) of the parameter with this full name."""
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

    shares_prefixes = picks_hidden_states = True

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin) -> ProcessorMixin:
        """Make the processor prepare rows as the LLaVA-1.5 authors' code does.

        The Hub's processor crops the image to its centre and omits the system prompt.
        """
        from transformers import LlavaProcessor

        images = processor.image_processor
        # Pixtral also uses LlavaProcessor, but with a different image processor.
        if type(processor) is not LlavaProcessor or not hasattr(images, "do_center_crop"):
            return processor
        if images.do_center_crop:
            processor.image_processor = llava_images(images.crop_size["height"])
            template = ASSETS / "model" / "chat_template.jinja"
            processor.chat_template = template.read_text(encoding="utf-8")
        return processor


@register_family("llava_next")
class LlavaNext(Family):
    """LLaVA-NeXT, which cuts large images into tiles."""

    shares_prefixes = picks_hidden_states = True

    @classmethod
    def tower_inputs(cls, config: Any, batch: dict[str, Tensor], rows: int) -> list[int]:
        """The number of tiles of each row's image.

        Args:
            config: The model's config.
            batch: The collated batch, with `image_sizes`.
            rows: Number of rows.
        """
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return [
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            for size in batch.get("image_sizes", ())
        ]


def llava_images(side: int) -> BaseImageProcessor:
    """The LLaVA-1.5 authors' image processor: pad to a square with the mean colour, then resize.

    Args:
        side: Height and width of the model's input, in pixels.
    """
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    square = {"height": side, "width": side}
    return LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size=square, crop_size=square, default_to_square=True
    )
