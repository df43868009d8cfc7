"""How likely a model finds the responses of some pairs, and its own greedy replies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from spavl_lib.config import Config
from spavl_lib.data.collate import PreferenceCollator, PromptCollator
from spavl_lib.evaluation.judges.phrases import refuses
from spavl_lib.generation.generate import generate_batch
from spavl_lib.machine import free_memory
from spavl_lib.modelling.load import autocast, load_policy, load_processor
from spavl_lib.objectives.logps import sequence_logps

ROWS = 4  # in a forward pass, because logits over a large vocabulary take much memory


def likelihood_frame(
    config: Config, models: Mapping[str, Path | None], rows: Sequence[dict[str, Any]]
) -> pd.DataFrame:
    """Mean log-probabilities, in nats, of chosen and rejected responses and of own greedy replies.

    The margin of a pair is how many nats more its chosen response has gained on the first model
    than its rejected one. If a reply was cut at `generation.max_new_tokens`, its log-probability is
    that of what it says so far.

    Args:
        config: The run's config.
        models: Title -> a trainer's folder `model/`, or None for the base model.
        rows: Preference rows.
    """
    processor, table = load_processor(config.model), {}
    collate = PromptCollator(processor)
    first: Tensor | None = None
    for title, folder in models.items():
        model = load_policy(config.model, folder)
        replies = []
        for start in range(0, len(rows), config.generation.batch_size):
            prompts = collate(list(rows[start : start + config.generation.batch_size]))
            replies += generate_batch(model, processor, prompts, config.generation)
        logps = response_logps(model, processor, rows, replies)
        del model
        free_memory()
        first = logps if first is None else first
        moved = logps - first
        table[title] = [
            "–" if first is logps else f"{(moved[0] - moved[1]).mean():.1f}",
            *(f"{value:.1f}" for value in logps.mean(1).tolist()),
            f"{sum(refuses(reply['response']) for reply in replies)} of {len(rows)}",
        ]
    columns = ["mean margin", "chosen", "rejected", "own reply", "own replies that refuse"]
    return pd.DataFrame.from_dict(table, orient="index", columns=columns)


def response_logps(
    model: nn.Module,
    processor: ProcessorMixin,
    rows: Sequence[dict[str, Any]],
    replies: Sequence[dict[str, Any]],
) -> Tensor:
    """Log-probabilities of chosen and rejected responses and of replies (3, rows), in nats.

    Args:
        model: The model.
        processor: Its processor.
        rows: Preference rows.
        replies: A reply to each row, as `generate_batch` returns it. The end token counts only if
            the reply is finished.
    """
    collate, parts = PreferenceCollator(processor), []
    asked = [row | {"own": reply["response"]} for row, reply in zip(rows, replies, strict=True)]
    for start in range(0, len(asked), ROWS):
        batch = collate.batch_of(asked[start : start + ROWS], "chosen", "rejected", "own")
        batch = {key: value.to(model.device) for key, value in batch.items()}
        mask = batch.pop("completion_mask").bool()
        count = len(mask) // 3
        for row, reply in zip(mask[2 * count :], replies[start : start + ROWS], strict=True):
            row[row.nonzero()[-1]] &= reply["finished"]
        with torch.no_grad(), autocast():
            logits = model(**batch).logits
        parts.append(sequence_logps(logits, batch["input_ids"], mask).reshape(3, count).cpu())
    return torch.cat(parts, 1)
