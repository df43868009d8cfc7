"""Greedy decoding in which an answer that has ended leaves the batch.

`model.generate` carries every row to the end of the longest answer, and its dynamic cache copies
all keys and values at every token. Here keys and values lie in buffers with room to grow, and
ended rows are taken out of them once a quarter has ended. What is chosen for a row depends on its
logits and its number alone, so its answer is `generate`'s up to rounding, whatever rows are left
beside it: equal in fp32, while in half precision ties may fall the other way.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from spavl_lib.modelling.speed.shared_prefix import backbone_of, unsupported

ROOM = 32  # tokens by which a buffer grows
KEPT = 0.75  # part of the rows still at work below which the others leave
# Settings a model may bring along that change nothing here: who decodes says when an answer ends,
# and how a token is chosen.
OVERRULED = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config",
})  # fmt: skip
# What does nothing at 1, and what nothing at 0; all others do nothing at False or None alone.
IDLE_AT_ONE = frozenset({
    "repetition_penalty", "encoder_repetition_penalty", "num_beams", "num_return_sequences",
    "num_beam_groups", "length_penalty", "guidance_scale",
})  # fmt: skip
IDLE_AT_ZERO = frozenset({
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens",
    "diversity_penalty",
})  # fmt: skip


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer as the filled part of larger buffers."""

    buffers: tuple[Tensor, Tensor] | None = None
    length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple:
        """Append (rows, heads, new, head_dim); the whole, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if self.buffers is None or self.buffers[0].shape[2] < end:
            self._lay_out(key_states, value_states, end + ROOM)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.buffers = tuple(b.index_select(0, indices) for b in self.buffers)
        self._show()

    def _unsupported(self, *_: object) -> None:
        raise NotImplementedError("a growing layer only grows, and lets rows go")

    crop = reorder_cache = reset = batch_repeat_interleave = _unsupported

    def _lay_out(self, key_states: Tensor, value_states: Tensor, size: int) -> None:
        larger = tuple(
            x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (key_states, value_states)
        )
        for buffer, old in zip(larger, self.buffers or (), strict=False):
            buffer[:, :, : self.length] = old[:, :, : self.length]
        self.buffers = larger

    def _show(self) -> None:
        self.keys, self.values = (b[:, :, : self.length] for b in self.buffers)


def can_decode(model: PreTrainedModel) -> bool:
    """Whether `decode` gives what `generate` would: positions count one by one, settings idle."""
    settings = model.generation_config.to_diff_dict()  # whatever differs from the library's own
    idle = all(
        value is None
        or value is False
        or name in OVERRULED
        or (name in IDLE_AT_ONE and value == 1)
        or (name in IDLE_AT_ZERO and value == 0)
        for name, value in settings.items()
    )
    return idle and not unsupported(backbone_of(model)) and not is_deepspeed_zero3_enabled()


@torch.no_grad()
def decode(
    model: nn.Module,
    batch: dict[str, Tensor],
    choose: Callable[[Tensor, list[int]], Tensor],
    *,
    max_new_tokens: int,
    eos_id: int,
) -> list[list[int]]:
    """Answers' ids, each up to and with its EOS, or `max_new_tokens` long.

    Args:
        model: In evaluation mode; `can_decode`.
        batch: Left-padded prompts (rows, length), with mask and image tensors.
        choose: From fp32 logits (rows at work, vocabulary) and those rows' numbers, a token each.
        max_new_tokens: Longest answer.
        eos_id: Ends an answer.
    """
    mask = batch["attention_mask"]
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    inputs, position = batch | {"position_ids": positions}, positions[:, -1:]
    answers: list[list[int]] = [[] for _ in mask]
    rows = list(range(len(mask)))
    going = set(rows)
    while True:
        out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = choose(out.logits[:, -1].float(), rows)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row in going:
                answers[row].append(token)
        going = {r for r in going if answers[r][-1] != eos_id and len(answers[r]) < max_new_tokens}
        if not going:
            return answers
        if len(going) < KEPT * len(rows):
            left = torch.tensor([i for i, r in enumerate(rows) if r in going], device=mask.device)
            mask, position, chosen = (x[left] for x in (mask, position, chosen))
            rows = [r for r in rows if r in going]
            for layer in cache.layers:
                layer.batch_select_indices(left)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        inputs = {"input_ids": chosen[:, None], "attention_mask": mask, "position_ids": position}
