"""Ask the models of a run a question about an image: the base model and every trained policy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spavl_lib.config import Config
from spavl_lib.config.loading import from_dict
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.images import ImageError, image_cell, open_image, png_bytes
from spavl_lib.data.templates import completion_ids, encode_prompts
from spavl_lib.errors import InputError
from spavl_lib.generation.generate import generate_batch
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import (
    context_length,
    load_policy,
    load_processor,
    quiet_libraries,
)
from spavl_lib.runs.files import read_json
from spavl_lib.stages import policies


@dataclass(frozen=True)
class Reply:
    """One model's answer to a question."""

    model: str
    """`base`, or the name of the stage that trained the model."""
    response: str
    finished: bool
    """Whether the response ended by itself, not at `generation.max_new_tokens`."""
    score: float | None
    """The score of the run's reward model, without unit; None if the run has no reward model."""


class RunModels:
    """The models of a run, which are loaded once, for any number of questions.

    Args:
        run_path: The run's folder.

    Raises:
        InputError: The run has no complete stage that trained a policy, or the manifest of such a
            stage cannot be read.
    """

    def __init__(self, run_path: Path):
        trained = _trained(run_path)
        self.config = config_of_run(run_path)
        quiet_libraries()
        self.processor = load_processor(self.config.model)
        self.models = {"base": load_policy(self.config.model)}
        for name, stage in trained.items():
            self.models[name] = load_policy(_config_of(stage).model, stage / "model")
        self.reward = None
        if _complete(run_path / "reward"):
            reward = run_path / "reward"
            self.reward = load_reward_model(_config_of(reward).model, reward / "model")

    def ask(self, image: Any, question: str) -> list[Reply]:
        """Every model's answer to one question, the base model's first.

        Args:
            image: A PIL image, the bytes of an image file, the path of one, or None for a question
                without an image.
            question: The question.

        Raises:
            InputError: The question is empty or too long for the model, or the image cannot be
                used.
        """
        if not question.strip():
            raise InputError("the question is empty")
        picture = None if image is None else picture_of(image)
        cell = picture and {"bytes": png_bytes(picture), "path": None}
        settings = self.config.generation
        batch = PromptCollator(self.processor)([{"id": "", "prompt": question, "image": cell}])
        length, context = batch["input_ids"].shape[1], context_length(self.config.model)
        if context and length + settings.max_new_tokens > context:
            raise InputError(
                f"the question is too long: {length} tokens with its image, and "
                f"{settings.max_new_tokens} for the answer, but the model takes {context} in all"
            )
        replies = []
        for name, model in self.models.items():
            [answer] = generate_batch(model, self.processor, batch, settings)
            text = answer["response"]
            score = self._score(picture, question, text) if self.reward else None
            replies.append(Reply(name, text, answer["finished"], score))
        return replies

    @torch.no_grad()
    def _score(self, picture: Image.Image | None, question: str, response: str) -> float:
        assert self.reward is not None
        prompt = encode_prompts(self.processor, [question], [picture])
        answer = completion_ids(self.processor, question, response, image=picture is not None)
        ids = torch.tensor([prompt.ids[0] + answer])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.vision}
        for name, [types] in prompt.token_types.items():
            batch[name] = torch.tensor([types + [0] * len(answer)])
        device = self.reward.device
        return self.reward(**{key: value.to(device) for key, value in batch.items()}).item()


def config_of_run(run_path: Path) -> Config:
    """The config of a run with at least one trained policy, as that policy's stage recorded it.

    Args:
        run_path: The run's folder.

    Raises:
        InputError: See `RunModels`.
    """
    return _config_of(next(iter(_trained(run_path).values())))


def _trained(run_path: Path) -> dict[str, Path]:
    """Name -> folder of each complete stage that trained a policy; at least one."""
    trained = {name: run_path / name for name in policies() if _complete(run_path / name)}
    if not trained:
        named = ", ".join(f"`spavl train {name}`" for name in policies())
        raise InputError(
            f"{run_path} has no trained model yet. Train one with the run's name: {named}"
        )
    return trained


def _complete(stage: Path) -> bool:
    return (stage / "summary.json").is_file() and (stage / "model").is_dir()


def _config_of(stage: Path) -> Config:
    try:
        return from_dict(read_json(stage / "manifest.json")["config"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{stage / 'manifest.json'} cannot be read: {error}") from error


def picture_of(image: Any) -> Image.Image:
    """The decoded image. A path may lead anywhere, because the user gave it.

    Args:
        image: See `RunModels.ask`; not None.

    Raises:
        InputError: The image cannot be used.
    """
    source: Path | bytes
    try:
        if isinstance(image, str | Path):
            source = Path(image).expanduser()
            if not source.is_file():
                raise InputError(f"no image {str(image)!r}: the file does not exist")
        else:
            cell = image_cell(image, Path())
            source = cell["bytes"] or Path(cell["path"])
        return open_image(source)
    except ImageError as error:
        shown = f"{image}: " if isinstance(image, str | Path) else ""
        raise InputError(f"{shown}{error}") from error
