"""Ask the models of a run a question about an image: the base model and every trained policy."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from spavl_lib.config import Config
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.images import ImageError, decode, image_cell, open_image, png_bytes
from spavl_lib.data.templates import completion_ids, encode_prompts
from spavl_lib.errors import InputError
from spavl_lib.generation.generate import generate_batch
from spavl_lib.machine import free_memory
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import (
    context_length,
    load_policy,
    load_processor,
    quiet_libraries,
)
from spavl_lib.runs.stage import has_model, recorded_config
from spavl_lib.runs.text import short_path
from spavl_lib.stages import policies

KEPT = 500_000_000  # parameters; models with fewer stay in memory


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
    """The models of a run, to be asked any number of questions.

    Models of fewer than `KEPT` parameters stay in memory after the first question. Larger ones are
    loaded for each question, one after the other, because a GPU rarely has memory for all of them.

    Args:
        run_path: The run's folder.
        only: Names of the trained policies to ask; empty for all of the run.

    Raises:
        InputError: The run has no complete stage that trained a policy, or the manifest of such a
            stage cannot be read. Or `only` names a model that it does not have.
    """

    def __init__(self, run_path: Path, only: Collection[str] = ()):
        self.config = config_of_run(run_path)
        trained = _trained(run_path)
        if unknown := sorted({*only} - {*trained}):
            raise InputError(
                f"{short_path(run_path)} has no trained model {', '.join(unknown)} "
                f"(it has: {', '.join(trained)})"
            )
        trained = {n: f for n, f in trained.items() if not only or n in only}
        self.folders: dict[str, Path | None] = {"base": None, **trained}
        reward = run_path / "reward"
        self.reward_folder = reward if has_model(reward) else None
        quiet_libraries()
        self.processor = load_processor(self.config.model)
        self._kept: dict[str, nn.Module] = {}

    def load(self, name: str) -> nn.Module:
        """The base model, a trained policy, or the reward model.

        Args:
            name: A key of `folders`, or `reward` if the run has a reward model.
        """
        if name not in self._kept:
            free_memory()  # of the model before, if it was not kept
            model: nn.Module
            if name == "reward":
                assert self.reward_folder is not None
                config = recorded_config(self.reward_folder).model
                model = load_reward_model(config, self.reward_folder / "model")
            elif (folder := self.folders[name]) is None:
                model = load_policy(self.config.model)
            else:
                model = load_policy(recorded_config(folder).model, folder / "model")
            if sum(p.numel() for p in model.parameters()) >= KEPT:
                return model
            self._kept[name] = model
        return self._kept[name]

    def ask(self, image: Any, question: str) -> list[Reply]:
        """Every model's answer to one question, the base model's first.

        Args:
            image: A PIL image, the bytes of an image file, the path of one, an image cell of a
                data set, or None for a question without an image.
            question: The question.

        Raises:
            InputError: The question is empty or too long for the model, or the image cannot be
                used.
        """
        if not question.strip():
            raise InputError("the question is empty")
        decoded = None if image is None else decoded_image(image)
        cell = decoded and {"bytes": png_bytes(decoded), "path": None}
        settings = self.config.generation
        batch = PromptCollator(self.processor)([{"id": "", "prompt": question, "image": cell}])
        length, context = batch["input_ids"].shape[1], context_length(self.config.model)
        if context and length + settings.max_new_tokens > context:
            raise InputError(
                f"the question is too long: {length} tokens with its image, and "
                f"{settings.max_new_tokens} for the answer, but the model takes {context} in all"
            )
        answers = {
            name: generate_batch(self.load(name), self.processor, batch, settings)[0]
            for name in self.folders
        }
        scores: list[float | None] = [None] * len(answers)
        if self.reward_folder:
            texts = [answer["response"] for answer in answers.values()]
            scores = [
                *response_scores(self.load("reward"), self.processor, decoded, question, texts)
            ]
        return [
            Reply(name, answer["response"], answer["finished"], score)
            for (name, answer), score in zip(answers.items(), scores, strict=True)
        ]


@torch.no_grad()
def response_scores(
    reward: nn.Module,
    processor: ProcessorMixin,
    image: Image.Image | None,
    question: str,
    responses: list[str],
) -> Iterator[float]:
    """The reward model's score of each response to a question.

    Args:
        reward: The reward model.
        processor: Its processor.
        image: The question's image, or None.
        question: The question.
        responses: The responses. Each is scored as one that ended by itself.
    """
    prompt = encode_prompts(processor, [question], [image])
    for response in responses:
        answer = completion_ids(processor, question, response, image=image is not None)
        ids = torch.tensor([prompt.ids[0] + answer])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.vision}
        for name, [types] in prompt.token_types.items():
            batch[name] = torch.tensor([types + [0] * len(answer)])
        yield reward(**{key: value.to(reward.device) for key, value in batch.items()}).item()


def config_of_run(run_path: Path) -> Config:
    """The config of a run with at least one trained policy.

    Args:
        run_path: The run's folder.

    Returns:
        The config that the inference stage recorded, or else the first trained policy's stage.

    Raises:
        InputError: See `RunModels`.
    """
    trained, inference = _trained(run_path), run_path / "inference"
    asked = (inference / "summary.json").is_file()
    return recorded_config(inference if asked else next(iter(trained.values())))


def _trained(run_path: Path) -> dict[str, Path]:
    """Name -> folder of each complete stage that trained a policy; at least one."""
    trained = {name: run_path / name for name in policies() if has_model(run_path / name)}
    if not trained:
        named = ", ".join(f"`spavl train {name}`" for name in policies())
        raise InputError(
            f"{run_path} has no trained model yet. Train one with the run's name: {named}"
        )
    return trained


def decoded_image(image: Any) -> Image.Image:
    """The decoded image. A path may lead anywhere, because the user gave it.

    Args:
        image: See `RunModels.ask`; not None.

    Raises:
        InputError: The image cannot be used.
    """
    try:
        if isinstance(image, str | Path):
            path = Path(image).expanduser()
            if not path.is_file():
                raise InputError(f"no image {str(image)!r}: the file does not exist")
            return open_image(path)
        if isinstance(image, dict):  # a cell, whose path was checked when the data were loaded
            return decode(image)
        return open_image(image_cell(image, Path())["bytes"])
    except ImageError as error:
        shown = f"{image}: " if isinstance(image, str | Path) else ""
        raise InputError(f"{shown}{error}") from error
