"""Lengths of the training rows in tokens, for a plan that fits the data instead of a guess."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from huggingface_hub import try_to_load_from_cache

from spavl_lib.config import Config, ModelConfig
from spavl_lib.data.lengths import ImageTokens, pair_lengths, prompt_lengths
from spavl_lib.data.load import load_preferences
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import load_processor, model_path

MOST_ROWS = 2000  # of a larger set, so many rows are counted, spread evenly over the set


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of the training rows. A sequence is a prompt, its image and a response."""

    rows: int
    """Number of training pairs."""
    longest: int
    """Tokens of the longest sequence."""
    longest_prompt: int
    longest_answer: int
    mean: float
    """Mean number of tokens of a sequence."""
    mean_answer: float


def lengths_at_hand(config: Config) -> Lengths | None:
    """Count the training rows, if data and tokenizer are on this machine. Nothing is fetched.

    Args:
        config: Uses `data` and `model`.

    Returns:
        The lengths; None if the data or the tokenizer would have to be fetched, or cannot be read.
    """
    data = config.data
    if data.source != "mini" and not (data.path and Path(data.path).expanduser().exists()):
        return None
    if not _at_hand(config.model):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a training shows them
            rows, processor = load_preferences(data, "train"), load_processor(config.model)
    except InputError:  # a training, and `spavl data check`, list what is wrong
        return None
    counted = rows.select(range(0, len(rows), max(1, -(-len(rows) // MOST_ROWS))))
    images = ImageTokens(processor)
    prompts = dict(prompt_lengths(processor, counted, images))
    sequences = [
        (size, size - prompts[row_id])
        for row_id, *sizes in pair_lengths(processor, counted, images=images)
        for size in sizes
    ]
    sizes, answers = zip(*sequences, strict=True)
    return Lengths(
        len(rows), max(sizes), max(prompts.values()), max(answers), mean(sizes), mean(answers)
    )


def _at_hand(model: ModelConfig) -> bool:
    """Whether the model's tokenizer is in a folder of this machine, or in the Hub's cache."""
    if Path(model_path(model)).exists():
        return True
    revision = model.revision or None
    cached = try_to_load_from_cache(model.name, "tokenizer_config.json", revision=revision)
    return isinstance(cached, str)
