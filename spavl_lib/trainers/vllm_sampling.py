"""Sampling with vLLM in trl's group trainers: weights, prompts and images as vLLM reads them.

trl's own sampler gives vLLM four things that do not work with LLaVA. It pushes the tower's weights
under names that vLLM does not know, and with them the projector of a reward model that shares the
policy's base. It hands over prompts whose image tokens are expanded already;
inside the training process vLLM expands them a second time without a warning
(huggingface/trl#6294). And vLLM prepares the images with the base model's own processor.
"""

import contextlib
from collections.abc import Iterator
from itertools import groupby
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration

from spavl_lib.errors import InputError
from spavl_lib.generation.vllm import prepared_image, served_base
from spavl_lib.modelling.for_vllm import vllm_name


class VLLMSampler(VLLMGeneration):
    """trl's sampler, with the weights' names, the prompts and the images that vLLM needs."""

    model: Any

    def _init_vllm(self) -> None:
        # trl asks the model only where it was loaded from, and for its 4-bit layers.
        model = self.model
        base = served_base(model.name_or_path)
        self.model = SimpleNamespace(name_or_path=base, named_modules=model.named_modules)
        try:
            super()._init_vllm()
        finally:
            self.model = model

    def _fix_param_name_to_vllm(self, name: str, extra_prefixes: list[str] | None = None) -> str:
        vision = getattr(self.model.config, "vision_config", None)
        name = super()._fix_param_name_to_vllm(name, extra_prefixes)
        return vllm_name(name, getattr(vision, "model_type", ""))

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        # The reward model may be an adapter on the same base, with a projector of its own.
        for name, parameter in super()._iter_named_params():
            if ".modules_to_save." not in name:
                yield name, parameter

    def generate(
        self,
        prompts: list[list[int]],
        images: list[list | None] | None,
        num_generations: int,
        profiler: Any = None,
    ) -> tuple:
        """Sample responses.

        Args:
            prompts: Token ids of each prompt, with image tokens expanded.
            images: For each prompt its decoded images, or None.
            num_generations: Number of responses to each distinct prompt.
            profiler: Context of trl that measures time.

        Returns:
            See trl's `VLLMGeneration.generate`.

        Raises:
            InputError: See `one_token_an_image`.
        """
        processor = self.processing_class
        if images is not None:
            images = [i and [prepared_image(processor, image) for image in i] for i in images]
            if self.mode == "colocate":  # a server places the images at the expanded tokens
                token = processor.image_token_id
                prompts = [
                    one_token_an_image(ids, token, len(i or ()))
                    for ids, i in zip(prompts, images, strict=True)
                ]
        return super().generate(prompts, images, num_generations, profiler)


def one_token_an_image(ids: list[int], image_token: int, images: int) -> list[int]:
    """Token ids with one image token for each image, which vLLM expands itself.

    Args:
        ids: Token ids of a prompt, with image tokens expanded.
        image_token: Id of the image token.
        images: Number of images of the prompt.

    Raises:
        InputError: The image tokens are not one run for each image.
    """
    runs = [(token, list(run)) for token, run in groupby(ids)]
    found = sum(token == image_token for token, _ in runs)
    if found != images:
        raise InputError(
            f"a prompt with {images} images has {found} runs of image tokens, so its prompt cannot "
            "be handed to vLLM in this process; set rloo.vllm_mode to server, or use_vllm to false"
        )
    return [i for token, run in runs for i in ([token] if token == image_token else run)]


@contextlib.contextmanager
def vllm_sampler(trainer_module: Any) -> Iterator[None]:
    """Let a trainer of trl that is built in this block sample with `VLLMSampler`.

    Args:
        trainer_module: The module of the trainer, such as `trl.trainer.rloo_trainer`.
    """
    before = trainer_module.VLLMGeneration
    trainer_module.VLLMGeneration = VLLMSampler
    try:
        yield
    finally:
        trainer_module.VLLMGeneration = before
