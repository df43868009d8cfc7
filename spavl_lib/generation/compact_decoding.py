"""Decoding that removes rows from the batch after their responses have ended.

`model.generate` computes every row until the longest response ends, and its dynamic cache copies
all keys and values at every token. Here, keys and values lie in buffers that grow in steps. Ended
rows are removed once more than a quarter of the rows have ended. The next token of a row depends
only on this row's logits and row number. In fp32 the responses therefore equal those of `generate`,
whichever rows remain in the batch. In half precision, rounding may decide a tie differently.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from spavl_lib.modelling.families import family_of, packs_images
from spavl_lib.modelling.speed.prefix_attention import FULL, layer_kinds
from spavl_lib.modelling.speed.shared_prefix import backbone_of, unsupported

ROOM = 32  # tokens by which a buffer grows
MIN_ACTIVE = 0.75  # ended rows are removed when a smaller share of the rows is active
# Settings in a model's generation config that have no effect here, because the caller of `decode`
# decides when a response ends and how a token is chosen.
OVERRULED = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config",
})  # fmt: skip
# Settings that have no effect if they are 1 (first set) or 0 (second set). Any other setting has no
# effect only if it is False or None.
IDLE_AT_ONE = frozenset({
    "repetition_penalty", "encoder_repetition_penalty", "num_beams", "num_return_sequences",
    "num_beam_groups", "length_penalty", "guidance_scale",
})  # fmt: skip
IDLE_AT_ZERO = frozenset({
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens",
    "diversity_penalty",
})  # fmt: skip


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, stored as the filled part of larger buffers."""

    buffers: tuple[Tensor, Tensor] | None = None
    length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple:
        """Append keys and values.

        Args:
            key_states: New keys (rows, heads, new tokens, head_dim).
            value_states: New values, of the same shape.

        Returns:
            All keys and all values (rows, heads, tokens, head_dim), as views of the buffers.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if self.buffers is None or self.buffers[0].shape[2] < end:
            self._allocate(key_states, value_states, end + ROOM)
        for buffer, new in zip(self.buffers or (), (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self._set_views()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices` (int64), in this order."""
        self.buffers = tuple(b.index_select(0, indices) for b in self.buffers or ())
        self._set_views()

    def _unsupported(self, *_: object) -> None:
        raise NotImplementedError("GrowingLayer supports only update() and batch_select_indices()")

    crop = reorder_cache = reset = batch_repeat_interleave = _unsupported

    def _allocate(self, key_states: Tensor, value_states: Tensor, size: int) -> None:
        larger = tuple(
            x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (key_states, value_states)
        )
        for buffer, old in zip(larger, self.buffers or (), strict=False):
            buffer[:, :, : self.length] = old[:, :, : self.length]
        self.buffers = larger

    def _set_views(self) -> None:
        self.keys, self.values = (b[:, :, : self.length] for b in self.buffers or ())


def can_decode(model: PreTrainedModel) -> bool:
    """Whether `decode` gives the same responses as `model.generate`.

    It does in families with `decodes_compactly` whose layers attend to all earlier tokens, if no
    generation setting of the model changes the logits, and DeepSpeed ZeRO-3 does not partition the
    weights.
    """
    backbone = backbone_of(model)
    known = (
        family_of(backbone.config).decodes_compactly
        and not packs_images(backbone.config)
        and set(layer_kinds(backbone.config.get_text_config())) == {FULL}
        and not unsupported(backbone)
    )
    settings = model.generation_config.to_diff_dict()  # settings that differ from the defaults
    idle = all(
        value is None
        or value is False
        or name in OVERRULED
        or (name in IDLE_AT_ONE and value == 1)
        or (name in IDLE_AT_ZERO and value == 0)
        for name, value in settings.items()
    )
    return known and idle and not is_deepspeed_zero3_enabled()


@torch.no_grad()
def decode(
    model: nn.Module,
    batch: dict[str, Tensor],
    choose: Callable[[Tensor, list[int]], Tensor],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
) -> list[list[int]]:
    """Generate responses to a batch of prompts.

    Args:
        model: A model in evaluation mode for which `can_decode` is true.
        batch: `input_ids` and `attention_mask` (rows, length), int64 and padded on the left, and
            the image tensors.
        choose: Takes logits (active rows, vocabulary) in fp32 and the numbers of these rows;
            returns a token id for each (active rows,).
        max_new_tokens: Longest response in tokens.
        end_ids: The tokens that end a response.

    Returns:
        Token ids of each response. A response ends with an end token, or has `max_new_tokens`
        tokens.
    """
    mask = batch["attention_mask"]
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    inputs, position = batch | {"position_ids": positions}, positions[:, -1:]
    responses: list[list[int]] = [[] for _ in mask]
    rows = list(range(len(mask)))
    active = set(rows)
    while True:
        out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = choose(out.logits[:, -1].float(), rows)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row in active:
                responses[row].append(token)
        active = {
            r
            for r in active
            if responses[r][-1] not in end_ids and len(responses[r]) < max_new_tokens
        }
        if not active:
            return responses
        if len(active) < MIN_ACTIVE * len(rows):
            active_indices = torch.tensor(
                [i for i, r in enumerate(rows) if r in active], device=mask.device
            )
            mask, position, chosen = (x[active_indices] for x in (mask, position, chosen))
            rows = [r for r in rows if r in active]
            for layer in cache.layers:
                layer.batch_select_indices(active_indices)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        inputs = {"input_ids": chosen[:, None], "attention_mask": mask, "position_ids": position}
