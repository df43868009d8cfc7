"""Let every process run the vision tower in every batch, as ZeRO-3 needs.

ZeRO-3 gathers a layer's parameters in all processes together. If one process has a batch without
images, it would skip the tower, and the others would wait for it. A blank image therefore goes
through tower and projector there. Its features are multiplied by 0 and added to the embeddings, so
they change neither the result nor a gradient.
"""

import inspect
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import ProcessorMixin

from spavl_lib.data.templates import encode_prompts
from spavl_lib.errors import InputError
from spavl_lib.modelling.speed.shared_prefix import backbone_of, text_model_of

SIDE = 64  # pixels of the blank image


class BlankImage:
    """Hooks of a backbone and of its text model.

    The blank image runs after the embeddings and before the text model, where a backbone encodes
    the images of a batch, because ZeRO-3 must gather the layers in the same order in all processes.
    For the same reason its features are added to the text model's input, and not to the output of
    the embeddings: a frozen embedding whose output has a gradient would be gathered again.

    Args:
        backbone: A backbone, with image features and a text model.
        processor: The model's processor.
    """

    def __init__(self, backbone: nn.Module, processor: ProcessorMixin):
        self.backbone = backbone
        self.forward_names = tuple(inspect.signature(type(backbone).forward).parameters)[1:]
        features = inspect.signature(type(backbone).get_image_features).parameters
        vision = encode_prompts(processor, ["a"], [Image.new("RGB", (SIDE, SIDE), "grey")]).vision
        self.vision = {name: value for name, value in vision.items() if name in features}
        self.pending: dict[str, Tensor] | None = None
        # Policy and reference get the same token ids. They then also get the same blank tensor, as
        # other processes give both the same pixels, whose tower outputs `vision_once` keeps.
        self.of_batch: WeakIdKeyDictionary = WeakIdKeyDictionary()
        backbone.register_forward_pre_hook(self._before, with_kwargs=True)
        text_model_of(backbone).register_forward_pre_hook(self._before_text, with_kwargs=True)

    def _before(self, backbone: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note whether this batch needs the blank image."""
        given = kwargs | dict(zip(self.forward_names, args, strict=False))
        ids, self.pending = given.get("input_ids"), None
        if ids is None or given.get("pixel_values") is not None or not self._partitioned():
            return
        past = given.get("past_key_values")
        if past is not None and past.get_seq_length():
            return  # a later pass of a generation, in which no process runs the tower
        if ids not in self.of_batch:
            self.of_batch[ids] = {k: v.to(ids.device, copy=True) for k, v in self.vision.items()}
        self.pending = self.of_batch[ids]

    def _partitioned(self) -> bool:
        """Whether the parameters are divided among processes."""
        return any(hasattr(p, "ds_id") for p in self.backbone.parameters())

    def _before_text(self, text: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Add 0 times the blank image's features to the text model's input."""
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        if kwargs.get("inputs_embeds") is None:
            raise InputError(
                f"{type(self.backbone).__name__} does not take rows without images under zero3; "
                "leave these rows out, or set launch.engine to zero2"
            )
        features: Any = self.backbone.get_image_features(**pending, return_dict=True).pooler_output
        parts = [features] if isinstance(features, Tensor) else features
        embeddings = kwargs["inputs_embeds"]
        nothing = sum((part * 0).sum() for part in parts).to(embeddings)  # no overflow in fp16
        return args, kwargs | {"inputs_embeds": embeddings + nothing}


def run_tower_always(model: nn.Module, processor: ProcessorMixin) -> None:
    """Install `BlankImage` in a model that ZeRO-3 partitions. Call it once for each model.

    Args:
        model: An image-text-to-text model, a PEFT model over one, or a `ScalarHeadModel`.
        processor: The model's processor.
    """
    backbone = backbone_of(model)
    if hasattr(backbone, "get_image_features") and text_model_of(backbone) is not None:
        backbone._blank_image = BlankImage(backbone, processor)
