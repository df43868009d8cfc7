"""Compute common prefixes once: image and question of a pair, or the image of several questions.

A preference batch holds image and question once for the chosen response and once for the rejected
response. `share_prefix` wraps the text model inside a backbone. The wrapper takes an ordinary batch
(rows, length) of embeddings, in which images already are, computes every common prefix once in one
packed row, and copies the hidden states to the positions of the ordinary batch. It does not depend
on the loss, so trl's trainers, a reward head and PPO use a wrapped model without changes.

    from spavl_lib.modelling.speed.shared_prefix import share_prefix
    share_prefix(model)            # an image-text model, a PEFT model over one, or a reward model
    DPOTrainer(model=model, ...)   # no change is needed

Results are equal up to rounding in the families with `shares_prefixes`. In other families the text
model's own forward runs, and one warning says so.

The idea comes from dpo-prefix-sharing (Wang et al. 2024, arXiv:2410.20305), which shares the prompt
text of two responses.
"""

import functools
import inspect
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from spavl_lib.errors import InputError
from spavl_lib.modelling.families import family_of
from spavl_lib.modelling.speed.fused_lora import fuse_lora
from spavl_lib.modelling.speed.prefix_attention import (
    FULL,
    PLANS,
    SLIDING,
    AttentionPlan,
    install,
    kernel_of,
    layer_kinds,
    uninstall,
)
from spavl_lib.modelling.speed.prefix_batch import NotShared, TextBatch
from spavl_lib.modelling.speed.prefix_tree import build_tree
from spavl_lib.modelling.speed.vision_once import VisionOnce, active_dropout

# Text models with rotary positions that tests/families tries.
TEXT_MODELS = (
    "cohere2", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm4v_text", "llama", "mistral",
    "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text", "qwen3_vl_moe_text",
)  # fmt: skip
# Types of rotary embedding whose frequencies depend on the longest row of the batch.
BATCH_WIDE_ROPE = ("dynamic", "longrope")
# Rows without a common prefix are packed too, which saves their padding, if they have at least so
# many tokens on average. Each row costs an attention call, which short rows do not earn back.
LONG_ROWS = 128
HANDLE = "_shared_prefix"  # attribute of backbone and text model that holds the `SharedPrefix`


class SharedPrefix:
    """The wrapper of a backbone's text model.

    `stats` counts all batches, the batches that shared a prefix, and the tokens before and after
    packing.
    """

    def __init__(self, backbone: nn.Module, *, strict: bool, min_shared: int):
        self.backbone, self.strict, self.min_shared = backbone, strict, min_shared
        self.text = text_model_of(backbone)
        self.plain_forward = self.text.forward
        self.signature, self.backbone_signature = (
            tuple(inspect.signature(type(module).forward).parameters)[1:]
            for module in (self.text, backbone)
        )
        # In a few text models the backbone's mask alone decides who attends to whom.
        attention = [m for m in self.text.modules() if hasattr(m, "layer_idx")]
        self.causal = all(getattr(m, "is_causal", True) for m in attention)
        self.vision = VisionOnce(backbone)
        self.ids: Tensor | None = None
        self.warned: set[str] = set()
        self.stats = {"batches": 0, "shared": 0, "rows_tokens": 0, "packed_tokens": 0}

        # The wrappers find this object through the module that is called, so that a copy of the
        # module uses the copy of this object.
        @functools.wraps(type(self.text).forward)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, HANDLE).forward(*args, **kwargs)

        self.text.forward = types.MethodType(forward, self.text)
        self.hook = backbone.register_forward_pre_hook(_note_ids, with_kwargs=True)
        install(self.text.config)
        for module in (backbone, self.text):
            setattr(module, HANDLE, self)

    def restore(self) -> None:
        """Remove the wrapper."""
        del self.text.forward
        for module in (self.backbone, self.text):
            delattr(module, HANDLE)
        self.hook.remove()
        self.vision.restore()
        uninstall(self.text.config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The text model's forward, with every common prefix computed once.

        Args:
            *args: Positional arguments of the text model's forward.
            **kwargs: Keyword arguments of the text model's forward, including `inputs_embeds`
                (rows, length, hidden).

        Returns:
            The text model's output, with `last_hidden_state` (rows, length, hidden).

        Raises:
            InputError: `strict` is set, and this batch cannot be packed.
        """
        kwargs |= dict(zip(self.signature, args, strict=False))
        ids, self.ids = self.ids, None
        self.stats["batches"] += 1
        try:
            self._check(kwargs)
            batch = TextBatch(kwargs, ids, self.text.config, self.causal, self.signature)
            return self._packed(batch)
        except NotShared as reason:
            self._warn(str(reason))
            return self.plain_forward(**kwargs)

    def _warn(self, reason: str) -> None:
        if self.strict and reason:
            raise InputError(f"model.share_prefix = require, but {reason}")
        if reason and reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"prefixes are not shared: {reason}", stacklevel=4)

    def _check(self, kwargs: dict) -> None:
        """Check that a packed row would give the same numbers as this batch.

        Raises:
            NotShared: The numbers could differ.
        """
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None or kwargs.get("input_ids") is not None:
            raise NotShared("the text model gets token ids instead of embeddings")
        cache, training = kwargs.get("past_key_values"), torch.is_grad_enabled()
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            raise NotShared("")  # a later pass of a generation
        if cache is None and kwargs.get("use_cache") and not training:
            raise NotShared("")  # the caller wants a cache that the text model makes
        if len(embeddings) == 1:
            raise NotShared("")
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if kwargs.get(name) or getattr(self.text.config, name, False):
                raise NotShared(f"{name} is set")
        if self.text.training and any(active_dropout(m) for m in self.text.modules()):
            raise NotShared("dropout is on, and branches would drop the same values")

    def _packed(self, batch: TextBatch) -> Any:
        """Run the packed row, and copy hidden states and KV cache back to (rows, length).

        Args:
            batch: The batch of the text model.

        Raises:
            NotShared: The rows have no common prefix, and are short or have no padding.
        """
        tree = build_tree(batch.keys(), self.min_shared)
        self.stats["rows_tokens"] += tree.rows_size
        self.stats["packed_tokens"] += tree.size
        padding = batch.rows * batch.length - tree.rows_size
        if tree.size == tree.rows_size and not (
            padding and tree.rows_size >= LONG_ROWS * batch.rows
        ):
            raise NotShared("")
        sources = batch.sources(tree)
        inner = batch.packed(sources, tree)
        embeddings = inner["inputs_embeds"] = self._looked_up(
            inner["inputs_embeds"], batch.ids.flatten()[torch.from_numpy(sources).to(batch.ids)]
        )
        plan = AttentionPlan.of(tree, self.text.config, batch.given_mask, embeddings)
        # In training a cache has no reader, although some backbones create one.
        cache = None if torch.is_grad_enabled() else inner.get("past_key_values")
        packed_cache = None if cache is None else DynamicCache()
        self.stats["shared"] += 1
        output = self.plain_forward(
            **inner
            | {
                "attention_mask": plan.placeholder(embeddings, inner.get("attention_mask")),
                "past_key_values": packed_cache,
                "use_cache": cache is not None,
                PLANS: plan,
            }
        )
        places, shape = batch.places(tree), (batch.rows, batch.length)
        hidden = output.last_hidden_state[0].index_select(0, places)
        output.last_hidden_state = hidden.view(*shape, -1)
        if cache is not None and packed_cache is not None:
            for number, layer in enumerate(packed_cache.layers):
                states = [
                    x[0].index_select(1, places).unflatten(1, shape).transpose(0, 1)
                    for x in (layer.keys, layer.values)
                ]
                cache.update(*states, number)
            output.past_key_values = cache
        return output

    def _looked_up(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """The packed embeddings, with those of text looked up again if the table is trained.

        The values stay the same. But the table's gradient is then summed over the packed tokens,
        and not over all rows, most of whose gradients are zero: less to add, in the packed order.

        Args:
            embeddings: Packed embeddings (1, packed, hidden), with those of images.
            ids: Token ids (packed,).
        """
        table = self.backbone.get_input_embeddings()
        if not (torch.is_grad_enabled() and table.weight.requires_grad):
            return embeddings
        found = table(ids[None])
        text = (found.detach() == embeddings.detach()).all(-1, keepdim=True)
        return torch.where(text, found, embeddings)


def _note_ids(backbone: nn.Module, args: tuple, kwargs: dict) -> None:
    """A backbone's hook that notes the token ids, which the text model does not get."""
    handle = getattr(backbone, HANDLE)
    given = kwargs | dict(zip(handle.backbone_signature, args, strict=False))
    handle.ids = given.get("input_ids")


def share_prefix(
    model: nn.Module, *, strict: bool = False, min_shared: int = 16
) -> SharedPrefix | None:
    """Make a model compute common prefixes of a batch once, if the results are equal.

    Args:
        model: An image-text-to-text model, a PEFT model over one, or a `ScalarHeadModel`; changed
            in place. If the model is already wrapped, its wrapper gets the new options.
        strict: Whether to raise an error if the family or a batch cannot share prefixes. If False,
            the backbone's own forward runs instead, and one warning says so.
        min_shared: A common run of fewer tokens is not shared.

    Returns:
        The wrapper. It has `stats`, and `restore()` removes it. None if the family cannot share
        prefixes.

    Raises:
        InputError: `strict` is set, and the family cannot share prefixes.
    """
    backbone = backbone_of(model)
    if (handle := getattr(backbone, HANDLE, None)) is not None:
        handle.strict, handle.min_shared = strict, min_shared
        return handle
    if reason := unsupported(backbone):
        if strict:
            raise InputError(f"model.share_prefix = require, but {reason}")
        warnings.warn(f"prefixes are not shared: {reason}", stacklevel=2)
        return None
    return SharedPrefix(backbone, strict=strict, min_shared=min_shared)


def apply_sharing(model: nn.Module, mode: str) -> bool:
    """Apply the setting `model.share_prefix`. Unless it is `off`, apply `fuse_lora` too.

    Args:
        model: See `share_prefix`.
        mode: auto, require or off.

    Returns:
        Whether the mode is not `off`.
    """
    if mode != "off":
        share_prefix(model, strict=mode == "require")
        fuse_lora(model)
    return mode != "off"


def backbone_of(model: nn.Module) -> nn.Module:
    """The backbone: the model without wrappers and without its language-model head."""
    model = getattr(model, "vlm", model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.base_model if hasattr(model, "lm_head") else model


def text_model_of(backbone: nn.Module) -> Any:
    """The text model inside a backbone; None if no module has one of the usual names."""
    return getattr(backbone, "language_model", None) or getattr(backbone, "text_model", None)


def unsupported(backbone: nn.Module) -> str:
    """Why a backbone cannot share prefixes with equal results; empty if it can."""
    config, text = backbone.config, backbone.config.get_text_config()
    kinds = set(layer_kinds(text))
    if others := sorted(kinds - {FULL, SLIDING}):
        return f"layers of kind {', '.join(others)} keep one state for everything before a token"
    if getattr(text, "cross_attention_layers", None):
        return "the text model takes images by cross attention"
    if text_model_of(backbone) is None or not hasattr(backbone, "get_image_features"):
        return f"a {type(backbone).__name__} has no text model, or no method for image features"
    if not family_of(config).shares_prefixes:
        return f"no test has shown that {config.model_type} gives equal results with it"
    if text.model_type not in TEXT_MODELS:
        return (
            f"no test has shown that the text model {text.model_type} gives equal results with it"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    by_kind = [r for r in rope.values() if isinstance(r, dict)]
    for parameters in by_kind or [rope]:
        if (kind := parameters.get("rope_type", "default")) in BATCH_WIDE_ROPE:
            return f"rotary positions of type {kind!r} depend on the longest row"
    attention = kernel_of(text)
    if attention == "flex_attention" and kinds != {FULL}:
        return "flex_attention is not combined with sliding-window layers"
    if attention not in ("eager", "sdpa", "flex_attention"):
        return f"attention {attention!r} does not support it (sdpa, eager and flex_attention do)"
    return ""
