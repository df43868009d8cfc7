"""The image and the question once, not four times: `share_prefix(model)`.

A preference batch writes image and question for the chosen answer and again for the rejected one.
The wrapper takes such a batch as it is, (rows, length), finds what rows have in common, image and
tokens, runs every common beginning once in one packed row, and lays the hidden states back where
the plain backbone would have put them. It knows rows, not losses: trl's trainers, a reward head and
PPO run over it unchanged.

    from spavl_lib.modelling.speed.shared_prefix import share_prefix
    share_prefix(model)            # a LLaVA, a PEFT model over one, or our scalar-head model
    DPOTrainer(model=model, ...)   # as before

Exact (up to rounding) for causal text models with rotary positions and full attention under
LLaVA-1.5 and LLaVA-NeXT. Qwen-VL's positions run in three axes, Idefics and others place images by
other means: there the plain path runs, and says so once.

After dpo-prefix-sharing (Wang et al. 2024, arXiv:2410.20305), which shares the text two answers
have in common.
"""

import functools
import inspect
import types
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spavl_lib.errors import InputError
from spavl_lib.modelling.families import FAMILIES, family_of, tower_of
from spavl_lib.modelling.speed.fused_lora import fuse_lora
from spavl_lib.modelling.speed.prefix_attention import (
    PLANS,
    PREFIX,
    AttentionPlan,
    install,
    uninstall,
)
from spavl_lib.modelling.speed.prefix_tree import PrefixTree, build_tree
from spavl_lib.modelling.speed.vision_once import ImageGroups, VisionMemory, active_dropout

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Frequencies of these follow the longest position in the batch.
BATCH_WIDE_ROPE = ("dynamic", "longrope")
IMAGE_KEY = 1 << 40  # keys of image tokens, above every token id
HANDLE = "_shared_prefix"


class NotShared(Exception):
    """Why a batch takes the plain path."""


class SharedPrefix:
    """What `share_prefix` puts around a backbone; `stats` counts what it saved."""

    def __init__(self, backbone: nn.Module, *, strict: bool, min_shared: int):
        self.backbone, self.strict, self.min_shared = backbone, strict, min_shared
        self.plain_forward = backbone.forward
        self.plain_features = backbone.get_image_features
        self.signature = tuple(inspect.signature(type(backbone).forward).parameters)[1:]
        self.vision = VisionMemory(tower_of(backbone))
        self.text = backbone.language_model
        self.said: set[str] = set()
        self.stats = {"batches": 0, "shared": 0, "rows_tokens": 0, "packed_tokens": 0}

        @functools.wraps(type(backbone).forward)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, HANDLE).forward(*args, **kwargs)

        @functools.wraps(type(backbone).get_image_features)
        def image_features(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, HANDLE).image_features(*args, **kwargs)

        backbone.forward = types.MethodType(forward, backbone)
        backbone.get_image_features = types.MethodType(image_features, backbone)
        install(self.text.config)
        setattr(backbone, HANDLE, self)

    def restore(self) -> None:
        """Take the wrapper off again."""
        del self.backbone.forward, self.backbone.get_image_features
        delattr(self.backbone, HANDLE)
        self.vision.restore()
        uninstall(self.text.config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's forward over (rows, length), with every common beginning run once.

        Raises:
            InputError: `strict`, and this batch cannot be shared.
        """
        kwargs |= dict(zip(self.signature, args, strict=False))
        pixels = kwargs.get("pixel_values")
        self.stats["batches"] += 1
        try:
            if _generating(kwargs) and not _prefilling(kwargs):
                raise NotShared("")
            self._check(kwargs)
            groups = features = None
            if kwargs.get("mm_encoder_outputs"):
                groups, features = _encoded(kwargs["mm_encoder_outputs"])
            elif pixels is not None and len(pixels):
                groups = self.vision.of(pixels, kwargs.get("image_sizes"))
                chosen = {k: v for k, v in kwargs.items() if k.startswith("vision_feature_")}
                features = self._features(groups, **chosen)
            return self._packed(features, groups, kwargs)
        except NotShared as reason:
            self._say(str(reason))
            return self.plain_forward(**kwargs)

    def image_features(
        self, pixel_values: Any, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The backbone's features of every image; equal pictures pass tower and projector once."""
        if not isinstance(pixel_values, Tensor) or not len(pixel_values):
            sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
            return self.plain_features(pixel_values, **sizes, **kwargs)
        groups = self.vision.of(pixel_values, image_sizes)
        kwargs.pop("return_dict", None)
        features = self._features(groups, **kwargs)
        return BaseModelOutputWithPooling(pooler_output=[features[g] for g in groups.group])

    def _features(self, groups: ImageGroups, **kwargs: Any) -> list[Tensor]:
        """Projected features (tokens, hidden) of every distinct picture."""
        sizes = {} if groups.sizes is None else {"image_sizes": groups.sizes}
        with self.vision.serve(groups):
            encoded = self.plain_features(
                pixel_values=groups.pixels, return_dict=True, **sizes, **kwargs
            )
        return list(encoded.pooler_output)

    def _say(self, reason: str) -> None:
        if self.strict and reason:
            raise InputError(f"model.share_prefix = require, but {reason}")
        if reason and reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"prefixes are not shared: {reason}", stacklevel=4)

    def _check(self, kwargs: dict) -> None:
        """Refuse what the packed row could not give exactly."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise NotShared("the batch comes as embeddings, not as tokens")
        if kwargs.get("mm_encoder_outputs") and not _prefilling(kwargs):
            raise NotShared("the batch comes with encoded images")
        if mask is not None and (mask.ndim != 2 or mask.shape != ids.shape):
            raise NotShared(f"the attention mask has shape {tuple(mask.shape)}, a custom one")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) or getattr(self.backbone.config, name, False):
                raise NotShared(f"{name} is asked for")
        if self.backbone.training and any(active_dropout(m) for m in self.text.modules()):
            raise NotShared("dropout is on: branches would drop the same values")
        if not isinstance(kwargs.get("pixel_values"), Tensor | None):
            raise NotShared("the images come as a list")

    def _packed(
        self, features: list[Tensor] | None, groups: ImageGroups | None, kwargs: dict
    ) -> Any:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        keys, real = self._keys(ids, mask, kwargs.get("position_ids"), features, groups)
        tree = build_tree(keys, self.min_shared)
        self.stats["rows_tokens"] += tree.rows_size
        self.stats["packed_tokens"] += tree.size
        if tree.size == tree.rows_size:
            raise NotShared("")
        self.stats["shared"] += 1
        device = ids.device
        row, offset = torch.from_numpy(tree.sources.T.copy()).to(device)
        first = torch.tensor([int(r.argmax()) for r in real], device=device)
        packed_ids = ids[row, first[row] + offset].unsqueeze(0)
        images = None if features is None else _images_in(tree, keys, features)
        plan = AttentionPlan.of(tree, self.text.config, device)
        inner = _with_images(kwargs, images) | {
            "input_ids": packed_ids,
            "position_ids": torch.from_numpy(tree.positions.copy()).unsqueeze(0).to(device),
            "attention_mask": plan.mask(packed_ids, self.text.dtype),
            "use_cache": False,
            **{PLANS: plan},
        }
        cache = kwargs.get("past_key_values")
        if cache is not None:
            inner |= {"use_cache": True, "past_key_values": DynamicCache()}
        output = self.plain_forward(**inner)
        place = np.zeros(tuple(ids.shape), dtype=np.int64)
        for i, places in enumerate(tree.places):
            place[i, real[i]] = places
        place = torch.from_numpy(place.ravel()).to(device)
        spread = output.last_hidden_state[0].index_select(0, place)
        output.last_hidden_state = spread.view(*ids.shape, -1)
        if cache is not None:
            for number, layer in enumerate(inner["past_key_values"].layers):
                states = [
                    x[0].index_select(1, place).unflatten(1, ids.shape).transpose(0, 1)
                    for x in (layer.keys, layer.values)
                ]
                cache.update(*states, number)
            output.past_key_values = cache
        output.image_hidden_states = None
        return output

    def _keys(
        self,
        ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        features: list[Tensor] | None,
        groups: ImageGroups | None,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """A key for every real token of every row: its id, or its picture and place in it."""
        numbers = ids.detach().cpu().numpy().astype(np.int64)
        real = np.ones(numbers.shape, bool) if mask is None else mask.detach().cpu().numpy() > 0
        starts, counts = real.argmax(1), real.sum(1)
        if (counts == 0).any():
            raise NotShared("a row is all padding")
        columns = np.arange(numbers.shape[1])
        unbroken = (columns >= starts[:, None]) & (columns < (starts + counts)[:, None])
        if (unbroken != real).any():
            raise NotShared("the attention mask has holes")
        if position_ids is not None:
            given = np.broadcast_to(position_ids.detach().cpu().numpy(), numbers.shape)
            steps = np.diff(given, axis=1)[real[:, 1:] & real[:, :-1]]
            if (steps != 1).any():
                raise NotShared("the positions given do not count one by one")
        if features is not None:
            slots = np.argwhere((numbers == self.backbone.config.image_token_id) & real)
            sizes = [len(features[g]) for g in groups.group]
            if len(slots) != sum(sizes):
                raise NotShared("")  # the plain path has its own message for that
            at = 0
            for picture, size in zip(groups.group, sizes, strict=True):
                rows, places = slots[at : at + size].T
                if (rows != rows[0]).any():
                    raise NotShared("an image's tokens are spread over two rows")
                numbers[rows, places] = IMAGE_KEY + picture * IMAGE_KEY + np.arange(size)
                at += size
        return [row[keep] for row, keep in zip(numbers, real, strict=True)], real


def share_prefix(
    model: nn.Module, *, strict: bool = False, min_shared: int = 16
) -> SharedPrefix | None:
    """Run what rows of a batch have in common once.

    Args:
        model: An image-text-to-text model, a PEFT model over one, or a `ScalarHeadModel`; changed
            in place. Wrapped already: its handle is given back.
        strict: Stop where a batch or the family cannot be shared; else the plain path runs there
            and says so once.
        min_shared: Fewest common tokens worth a segment of their own.

    Returns:
        The handle: `stats`, and `restore()` to undo. None where the family is not exact.

    Raises:
        InputError: `strict`, and the family is not one that is exact.
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
    """What the setting `model.share_prefix` says: True if anything may be wrapped (not `off`).

    Unless `off`, which is the plain path whole, LoRA's products are fused too.
    """
    if mode != "off":
        share_prefix(model, strict=mode == "require")
        fuse_lora(model)
    return mode != "off"


def backbone_of(model: nn.Module) -> nn.Module:
    """The model below the language-model head, whatever is wrapped around it."""
    model = getattr(model, "vlm", model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.base_model if hasattr(model, "lm_head") else model


def unsupported(backbone: nn.Module) -> str:
    """Why a backbone cannot share prefixes exactly; empty if it can."""
    config = backbone.config
    if not family_of(config).shares_prefixes:
        exact = [name for name, family in FAMILIES.known.items() if family.shares_prefixes]
        return f"{config.model_type} is not one of {', '.join(exact)}, which give equal results"
    text = config.get_text_config()
    if text.model_type not in TEXT_MODELS:
        return f"the text model {text.model_type} is not one of {', '.join(TEXT_MODELS)}"
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in BATCH_WIDE_ROPE:
        return f"rotary positions of type {rope['rope_type']!r} depend on the longest row"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    ):
        return "the text model attends in a sliding window"
    attention = text._attn_implementation.removeprefix(PREFIX)  # wrapped already
    if attention not in ("eager", "sdpa", "flex_attention"):
        return f"attention {attention!r} takes no tree (sdpa and eager do)"
    return ""


def _generating(kwargs: dict) -> bool:
    return kwargs.get("past_key_values") is not None or (
        kwargs.get("use_cache", False) and not torch.is_grad_enabled()
    )


def _prefilling(kwargs: dict) -> bool:
    """Whether this is the first pass of a generation, over prompts, with its cache still empty."""
    cache = kwargs.get("past_key_values")
    return (
        type(cache) is DynamicCache
        and cache.get_seq_length() == 0
        and not torch.is_grad_enabled()
        and bool(kwargs.get("use_cache", True))
    )


def _encoded(outputs: dict) -> tuple[ImageGroups, list[Tensor]]:
    """Images that `generate` encoded through `image_features`: one tensor for equal pictures.

    Raises:
        NotShared: They are something else than a list.
    """
    pooled = outputs["image"].pooler_output if set(outputs) == {"image"} else None
    if not isinstance(pooled, list | tuple):
        raise NotShared("the batch comes with encoded images")
    number: dict[int, int] = {}
    group = [number.setdefault(id(features), len(number)) for features in pooled]
    first = [group.index(g) for g in range(len(number))]
    return ImageGroups(first, group, torch.empty(0), None), [pooled[i] for i in first]


def _with_images(kwargs: dict, features: list[Tensor] | None) -> dict:
    """The arguments with encoded images in place of pixels."""
    dropped = ("pixel_values", "image_sizes", "mm_encoder_outputs")
    inner = {k: v for k, v in kwargs.items() if k not in dropped}
    if features:
        encoded = BaseModelOutputWithPooling(pooler_output=features)
        inner["mm_encoder_outputs"] = {"image": encoded}
    return inner


def _images_in(tree: PrefixTree, keys: list[np.ndarray], features: list[Tensor]) -> list[Tensor]:
    """Features of the pictures as they follow one another in the packed row."""
    row, offset = tree.sources.T
    packed = np.empty(tree.size, np.int64)
    for r in np.unique(row):
        packed[row == r] = keys[r][offset[row == r]]
    starts = packed[(packed >= IMAGE_KEY) & (packed % IMAGE_KEY == 0)]
    return [features[int(k // IMAGE_KEY) - 1] for k in starts]
