"""Compute common prefixes once: image and question of a pair, or the image of several questions.

A preference batch holds image and question once for the chosen response and once for the rejected
response. `share_prefix` wraps a model's backbone. The wrapper takes an ordinary batch (rows,
length), computes every common prefix once in one packed row, and copies the hidden states to the
positions of the ordinary batch. It does not depend on the loss, so trl's trainers, a reward head
and PPO use a wrapped model without changes.

    from spavl_lib.modelling.speed.shared_prefix import share_prefix
    share_prefix(model)            # a LLaVA, a PEFT model over one, or a scalar-head model
    DPOTrainer(model=model, ...)   # no change is needed

Results are equal up to rounding for causal text models with rotary positions and full attention, in
the families with `shares_prefixes`. For other families (such as Qwen-VL, whose positions have three
axes) the backbone's own forward runs, and one warning says so.

The idea comes from dpo-prefix-sharing (Wang et al. 2024, arXiv:2410.20305), which shares the prompt
text of two responses.
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
from spavl_lib.modelling.families import FAMILIES, family_of, packs_images, tower_of
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
# Types of rotary embedding whose frequencies depend on the longest row of the batch.
BATCH_WIDE_ROPE = ("dynamic", "longrope")
IMAGE_KEY = 1 << 40  # keys of image tokens start here, above every token id
HANDLE = "_shared_prefix"  # attribute of a wrapped backbone that holds its `SharedPrefix`


class NotShared(Exception):
    """Raised if a batch cannot be packed, so that the backbone's own forward runs.

    The message is the reason. An empty message means that no warning is needed.
    """


class SharedPrefix:
    """The wrapper of a backbone.

    `stats` counts all batches, the batches that shared a prefix, and the tokens before and after
    packing.
    """

    def __init__(self, backbone: nn.Module, *, strict: bool, min_shared: int):
        self.backbone, self.strict, self.min_shared = backbone, strict, min_shared
        self.plain_forward = backbone.forward
        self.plain_features = backbone.get_image_features
        self.signature = tuple(inspect.signature(type(backbone).forward).parameters)[1:]
        self.vision = VisionMemory(tower_of(backbone))
        self.text = backbone.language_model
        self.warned: set[str] = set()
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
        """Remove the wrapper."""
        del self.backbone.forward, self.backbone.get_image_features
        delattr(self.backbone, HANDLE)
        self.vision.restore()
        uninstall(self.text.config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's forward, with every common prefix computed once.

        Args:
            *args: Positional arguments of the backbone's forward.
            **kwargs: Keyword arguments of the backbone's forward, including `input_ids`
                (rows, length).

        Returns:
            The backbone's output, with `last_hidden_state` (rows, length, hidden).

        Raises:
            InputError: `strict` is set, and this batch cannot be packed.
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
                options = {k: v for k, v in kwargs.items() if k.startswith("vision_feature_")}
                features = self._features(groups, **options)
            return self._packed(features, groups, kwargs)
        except NotShared as reason:
            self._warn(str(reason))
            return self.plain_forward(**kwargs)

    def image_features(
        self, pixel_values: Any, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The backbone's features of every image. Tower and projector compute equal images once.

        Args:
            pixel_values: Images (count, ...).
            image_sizes: Heights and widths before preprocessing (count, 2), in pixels; None if the
                family has no sizes.
            **kwargs: Further arguments of the backbone's method.
        """
        if not isinstance(pixel_values, Tensor) or not len(pixel_values):
            sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
            return self.plain_features(pixel_values, **sizes, **kwargs)
        groups = self.vision.of(pixel_values, image_sizes)
        kwargs.pop("return_dict", None)
        features = self._features(groups, **kwargs)
        return BaseModelOutputWithPooling(pooler_output=[features[g] for g in groups.group])

    def _features(self, groups: ImageGroups, **kwargs: Any) -> list[Tensor]:
        """Projected features (tokens, hidden) of every distinct image."""
        sizes = {} if groups.sizes is None else {"image_sizes": groups.sizes}
        with self.vision.serve(groups):
            encoded = self.plain_features(
                pixel_values=groups.pixels, return_dict=True, **sizes, **kwargs
            )
        return list(encoded.pooler_output)

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
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise NotShared("the batch holds embeddings instead of token ids")
        if kwargs.get("mm_encoder_outputs") and not _prefilling(kwargs):
            raise NotShared("the batch holds encoded images")
        if mask is not None and (mask.ndim != 2 or mask.shape != ids.shape):
            raise NotShared(f"the attention mask has shape {tuple(mask.shape)}, not (rows, length)")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) or getattr(self.backbone.config, name, False):
                raise NotShared(f"{name} is set")
        if self.backbone.training and any(active_dropout(m) for m in self.text.modules()):
            raise NotShared("dropout is on, and branches would drop the same values")
        if not isinstance(kwargs.get("pixel_values"), Tensor | None):
            raise NotShared("pixel_values is a list, not a tensor")

    def _packed(
        self, features: list[Tensor] | None, groups: ImageGroups | None, kwargs: dict
    ) -> Any:
        """Run the packed row, and copy hidden states and KV cache back to (rows, length).

        Args:
            features: Features (tokens, hidden) of each distinct image, or None.
            groups: Which images of the batch are equal, or None.
            kwargs: Arguments of the backbone's forward.

        Raises:
            NotShared: The rows have no common prefix, or the batch cannot be packed.
        """
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
        packed_index = np.zeros(tuple(ids.shape), dtype=np.int64)
        for i, places in enumerate(tree.places):
            packed_index[i, real[i]] = places
        packed_index = torch.from_numpy(packed_index.ravel()).to(device)
        rows = output.last_hidden_state[0].index_select(0, packed_index)
        output.last_hidden_state = rows.view(*ids.shape, -1)
        if cache is not None:
            for number, layer in enumerate(inner["past_key_values"].layers):
                states = [
                    x[0].index_select(1, packed_index).unflatten(1, ids.shape).transpose(0, 1)
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
        """Compute a key for every token that is not padding.

        Args:
            ids: Token ids (rows, length).
            mask: Attention mask (rows, length), or None.
            position_ids: Positions (rows, length) or (1, length), or None.
            features: Features (tokens, hidden) of each distinct image, or None.
            groups: Which images of the batch are equal, or None.

        Returns:
            For each row its keys (tokens,). A text token's key is its token id; an image token's
            key stands for the image and the token's index in that image. Second, a mask
            (rows, length), True for tokens and False for padding.

        Raises:
            NotShared: The mask, the positions or the image tokens have an unexpected layout.
        """
        numbers = ids.detach().cpu().numpy().astype(np.int64)
        real = np.ones(numbers.shape, bool) if mask is None else mask.detach().cpu().numpy() > 0
        starts, counts = real.argmax(1), real.sum(1)
        if (counts == 0).any():
            raise NotShared("a row holds only padding")
        columns = np.arange(numbers.shape[1])
        unbroken = (columns >= starts[:, None]) & (columns < (starts + counts)[:, None])
        if (unbroken != real).any():
            raise NotShared("the attention mask has holes")
        if position_ids is not None:
            positions = np.broadcast_to(position_ids.detach().cpu().numpy(), numbers.shape)
            steps = np.diff(positions, axis=1)[real[:, 1:] & real[:, :-1]]
            if (steps != 1).any():
                raise NotShared("position_ids do not count up one by one")
        if features is not None:
            assert groups is not None
            slots = np.argwhere((numbers == self.backbone.config.image_token_id) & real)
            sizes = [len(features[g]) for g in groups.group]
            if len(slots) != sum(sizes):
                raise NotShared("")  # the backbone's own forward raises an error for this case
            start = 0
            for image, size in zip(groups.group, sizes, strict=True):
                slot_rows, slot_columns = slots[start : start + size].T
                if (slot_rows != slot_rows[0]).any():
                    raise NotShared("the tokens of an image lie in two rows")
                numbers[slot_rows, slot_columns] = IMAGE_KEY + image * IMAGE_KEY + np.arange(size)
                start += size
        return [row[keep] for row, keep in zip(numbers, real, strict=True)], real


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


def unsupported(backbone: nn.Module) -> str:
    """Why a backbone cannot share prefixes with equal results; empty if it can."""
    config = backbone.config
    if not family_of(config).shares_prefixes:
        sharing = [name for name, family in FAMILIES.known.items() if family.shares_prefixes]
        return f"{config.model_type} is not one of {', '.join(sharing)}, which give equal results"
    if packs_images(config):
        return f"the tower {config.vision_config.model_type} lays all images into one row"
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
        return "the text model uses sliding-window attention"
    # The name starts with `PREFIX` if the backbone is already wrapped.
    attention = text._attn_implementation.removeprefix(PREFIX)
    if attention not in ("eager", "sdpa", "flex_attention"):
        return f"attention {attention!r} does not support it (sdpa, eager and flex_attention do)"
    return ""


def _generating(kwargs: dict) -> bool:
    return kwargs.get("past_key_values") is not None or (
        kwargs.get("use_cache", False) and not torch.is_grad_enabled()
    )


def _prefilling(kwargs: dict) -> bool:
    """Whether this is the first pass of a generation, over the prompts, with an empty KV cache."""
    cache: Any = kwargs.get("past_key_values")
    return (
        type(cache) is DynamicCache
        and cache.get_seq_length() == 0
        and not torch.is_grad_enabled()
        and bool(kwargs.get("use_cache", True))
    )


def _encoded(outputs: dict) -> tuple[ImageGroups, list[Tensor]]:
    """Groups and features of images that `generate` already encoded.

    `image_features` returns the same tensor object for equal images, so images are grouped by the
    identity of their tensor.

    Raises:
        NotShared: The features are not a list with one tensor for each image.
    """
    pooled = outputs["image"].pooler_output if set(outputs) == {"image"} else None
    if not isinstance(pooled, list | tuple):
        raise NotShared("the batch holds encoded images")
    number: dict[int, int] = {}
    group = [number.setdefault(id(features), len(number)) for features in pooled]
    first = [group.index(g) for g in range(len(number))]
    return ImageGroups(first, group, torch.empty(0), None), [pooled[i] for i in first]


def _with_images(kwargs: dict, features: list[Tensor] | None) -> dict:
    """The arguments with the images' features instead of pixels."""
    dropped = ("pixel_values", "image_sizes", "mm_encoder_outputs")
    inner = {k: v for k, v in kwargs.items() if k not in dropped}
    if features:
        encoded = BaseModelOutputWithPooling(pooler_output=features)
        inner["mm_encoder_outputs"] = {"image": encoded}
    return inner


def _images_in(tree: PrefixTree, keys: list[np.ndarray], features: list[Tensor]) -> list[Tensor]:
    """Features of the images, in the order in which they appear in the packed row."""
    row, offset = tree.sources.T
    packed = np.empty(tree.size, np.int64)
    for r in np.unique(row):
        packed[row == r] = keys[r][offset[row == r]]
    starts = packed[(packed >= IMAGE_KEY) & (packed % IMAGE_KEY == 0)]
    return [features[int(k // IMAGE_KEY) - 1] for k in starts]
