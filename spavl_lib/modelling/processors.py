"""Put a model's processor together from its tokenizer and the PIL class of its image processor.

`AutoProcessor` chooses the class of the image processor by what is installed. The pixels of
torchvision's class differ from the pixels of the PIL class by up to 0.015. Without torchvision,
the processors of Qwen-VL, InternVL, LLaVA-OneVision, Pixtral and SmolVLM do not load at all; most
of them contain a video processor, which needs torchvision. This module always uses the PIL class,
and leaves videos out.
"""

import hashlib
import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_torchvision_available
from transformers.utils.hub import cached_file

from spavl_lib.data.templates import render
from spavl_lib.errors import InputError

PIXTRAL = "transformers.models.pixtral"
# Files that may name the class of the processor, in the order in which transformers reads them.
NAMING = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
VIDEO = "video_preprocessor_config.json"


class NoVideos(dict):
    """Takes the place of a processor's video processor, and holds the video processor's settings.

    Saving the processor therefore writes these settings again.
    """

    model_input_names: tuple[str, ...] = ()
    _auto_class = None


def read_processor(path: str, revision: str | None, model_type: str) -> ProcessorMixin:
    """Read a processor.

    Args:
        path: A folder or Hub id.
        revision: Revision of a Hub id; None for the newest one.
        model_type: `model_type` of the model's config. It decides the class if no file names one.

    Raises:
        InputError: The processor's class needs a package that is not installed.
        OSError: A file is missing.
        ValueError: A file cannot be read.
    """
    pages = {name: _page(path, name, revision) for name in (*NAMING, VIDEO)}
    name = next(
        (pages[file]["processor_class"] for file in NAMING if "processor_class" in pages[file]),
        PROCESSOR_MAPPING_NAMES.get(model_type),
    )
    kind = _class_of(name) if isinstance(name, str) else None
    if kind is None:  # transformers has no class of this name, so AutoProcessor chooses one
        processor = AutoProcessor.from_pretrained(path, revision=revision)
    else:
        videos = pages[NAMING[0]].get("video_processor") or pages[VIDEO] or pages[NAMING[1]]
        processor = _assembled(kind, path, revision, videos)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"it has a {type(processor).__name__}, but no processor for images")
    return processor


def _page(path: str, name: str, revision: str | None) -> dict[str, Any]:
    """The contents of a JSON file of the model; empty if the model has no such file."""
    file = cached_file(
        path, name, revision=revision,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    page = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return page if isinstance(page, dict) else {}


def _class_of(name: str) -> type[ProcessorMixin] | None:
    """The processor class of this name in transformers; None if transformers has none."""
    if name == "PixtralProcessor" and not is_torchvision_available():
        return _pixtral()
    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, ProcessorMixin) else None


def _pixtral() -> type[ProcessorMixin]:
    """Import Pixtral's processor class without torchvision.

    The module of this class imports one function from a module that needs torchvision. The module
    of the PIL image processor has the same function, so the import gets that module instead.
    """
    wanted = f"{PIXTRAL}.image_processing_pixtral"
    sys.modules[wanted] = importlib.import_module(f"{PIXTRAL}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(f"{PIXTRAL}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[wanted]


def _assembled(
    kind: type[ProcessorMixin], path: str, revision: str | None, videos: dict[str, Any]
) -> ProcessorMixin:
    """A processor of this class, with the PIL image processor and without videos.

    Args:
        kind: The processor's class.
        path: A folder or Hub id.
        revision: Revision of a Hub id; None for the newest one.
        videos: Settings of the video processor. They are saved with the processor.
    """

    class Assembled(kind):  # type: ignore[valid-type,misc]
        @classmethod
        def _get_arguments_from_pretrained(cls, *_: Any, **__: Any) -> list[Any]:
            parts = {
                "tokenizer": lambda: AutoTokenizer.from_pretrained(path, revision=revision),
                "image_processor": lambda: AutoImageProcessor.from_pretrained(
                    path, revision=revision, backend="pil"
                ),
                "video_processor": lambda: NoVideos(videos),
            }
            return [parts[name]() for name in kind.get_attributes()]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

    if unknown := set(kind.get_attributes()) - {"tokenizer", "image_processor", "video_processor"}:
        raise ValueError(f"its {kind.__name__} also takes {', '.join(sorted(unknown))}")
    try:
        processor = Assembled.from_pretrained(path, **({"revision": revision} if revision else {}))
    except ImportError as error:
        raise InputError(f"the processor of {path!r} needs a package: {_first(error)}") from error
    processor.__class__ = kind
    return processor


def _first(error: ImportError) -> str:
    """The first sentence of a message about a missing package."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def complete(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Add settings of image tokens and a padding token, which older checkpoints leave out.

    Args:
        processor: Changed in place.
        config: The model's config.

    Raises:
        ValueError: The tokenizer has no end token, or the id of its BOS, end or padding token is
            outside of the model's vocabulary.
    """
    vision, tokenizer = getattr(config, "vision_config", None), processor.tokenizer
    for name, owner in (("patch_size", vision), ("vision_feature_select_strategy", config)):
        if getattr(processor, name, "") is None:
            setattr(processor, name, getattr(owner, name, None))
    # CLIP puts one token of its own before the patches. Older files do not count this token.
    if getattr(processor, "num_additional_image_tokens", 1) == 0 and (
        getattr(vision, "model_type", "") == "clip_vision_model"
    ):
        processor.num_additional_image_tokens = 1
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "its tokenizer names no end token; set eos_token in tokenizer_config.json to the token "
            "that ends an answer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        warnings.warn(
            f"{tokenizer.name_or_path}: its tokenizer has no padding token; its end token "
            f"{tokenizer.eos_token!r} is used for padding, and attention masks mark the padding",
            stacklevel=2,
        )
    rows = getattr(config.get_text_config(), "vocab_size", None)
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    beyond = [tokenizer.convert_ids_to_tokens(i) for i in named if rows and (i or 0) >= rows]
    if beyond:
        raise ValueError(
            f"the model's vocabulary has {rows} rows, none for {', '.join(dict.fromkeys(beyond))} "
            "of its tokenizer; the two do not belong together"
        )


def check_template(processor: ProcessorMixin) -> None:
    """Check that the chat template writes a question, its image and an answer.

    If the processor has no template, the tokenizer's template is used. Many tokenizers' templates
    support text only. They would write a message with an image as Python prints a list.

    Raises:
        ValueError: There is no template, or the template fails or leaves one of the three out.
    """
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise ValueError(
            "it has no chat template; write the one that it was trained with into "
            "chat_template.jinja in the model's folder"
        )
    try:
        text = render(processor, "Question one?", "Answer two.")
    except TemplateError as error:
        raise ValueError(f"its chat template fails: {error}") from error
    slot = getattr(processor, "image_token", "") or ""
    missing = [word for word in ("Question one?", "Answer two.", slot) if word not in text]
    if missing or "'type'" in text:
        raise ValueError(
            f"its chat template writes no {', no '.join(map(repr, missing)) or 'plain text'} for a "
            "question with an image and its answer; write one that does into chat_template.jinja "
            "in the model's folder"
        )


def describe(processor: ProcessorMixin) -> dict[str, str]:
    """A processor's entry in the manifest: two class names, and a hash of the chat template."""
    template = json.dumps(processor.chat_template).encode()
    return {
        "class": type(processor).__name__,
        "image_processor": type(processor.image_processor).__name__,
        "chat_template_sha256": hashlib.sha256(template).hexdigest(),
    }


def square_llava_processor(
    tokenizer: PreTrainedTokenizerBase, size: int, patch: int, template: str
) -> LlavaProcessor:
    """LLaVA-1.5's processor. It pads images to a square with the mean colour, without a crop.

    Args:
        tokenizer: The tokenizer. It knows the image token.
        size: Side of an image for the tower, in pixels.
        patch: Side of a patch, in pixels.
        template: The chat template.
    """
    side = {"height": size, "width": size}
    images = LlavaImageProcessorPil(
        do_pad=True, size=side, crop_size=side, do_center_crop=False, default_to_square=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
