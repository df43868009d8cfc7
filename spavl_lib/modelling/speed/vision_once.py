"""Compute the visual features of each distinct image of a batch once.

A frozen tower's outputs are kept as long as the batch's pixel tensor exists.
"""

import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spavl_lib.modelling.families import tower_of

HANDLE = "_vision_once"  # attribute of a wrapped backbone that holds its `VisionOnce`


@dataclass(frozen=True)
class ImageGroups:
    """The images of a batch, grouped by equal pixels."""

    first: list[int]
    """For each group the index of its first image, in order of appearance."""
    group: list[int]
    """For each image the number of its group, which is an index into `first`."""
    arguments: dict[str, Tensor]
    """Arguments of the backbone's `get_image_features` for the distinct images."""
    kept: dict[tuple, dict] = field(default_factory=dict)
    """Outputs of the frozen tower for the distinct images, by `VisionOnce.state`."""


def group_images(images: Sequence[Tensor], companions: Sequence[Tensor] = ()) -> ImageGroups:
    """Group equal images. All pixels are compared; checksums only select the candidates.

    Args:
        images: The images, of any shapes.
        companions: Further tensors with one entry for each image, such as its size. Equal images
            also have equal entries.
    """
    with torch.no_grad():
        flat = [image.detach().flatten() for image in images]
        sums = [torch.stack([f.sum(dtype=torch.float64), f[::7].sum(dtype=torch.float64)])
                for f in flat]  # fmt: skip
        checksums = torch.stack(sums).tolist()
        others = [c.cpu().numpy() for c in companions]
        first: list[int] = []
        group: list[int] = []
        by_checksum: dict[tuple, list[int]] = {}
        for i, checksum in enumerate(checksums):
            key = (*checksum, images[i].shape, *(c[i].tobytes() for c in others))
            candidates = by_checksum.setdefault(key, [])
            equal = next((g for g in candidates if torch.equal(images[first[g]], images[i])), None)
            if equal is None:
                equal = len(first)
                candidates.append(equal)
                first.append(i)
            group.append(equal)
    return ImageGroups(first, group, {})


class VisionOnce:
    """The wrapper of a backbone's `get_image_features`, and of its tower.

    Policy and reference get the same pixel tensor, and so do PPO's passes over a rollout. The
    frozen tower therefore runs in the first pass only. The projector runs in every pass, because it
    trains. `images_run` counts the images that went through the tower.
    """

    def __init__(self, backbone: nn.Module):
        self.backbone, self.tower = backbone, tower_of(backbone)
        self.plain_features = backbone.get_image_features
        self.signature = tuple(inspect.signature(type(backbone).get_image_features).parameters)[1:]
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.serving: ImageGroups | None = None
        self.outputs: dict | None = None
        self.images_run = 0
        self.plain_forward = self.tower.forward

        # `generate` reads the signature of this method.
        @functools.wraps(type(backbone).get_image_features)
        def image_features(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, HANDLE).features(*args, **kwargs)

        backbone.get_image_features = types.MethodType(image_features, backbone)
        self.tower.forward = self.forward
        setattr(backbone, HANDLE, self)

    def __deepcopy__(self, memo: dict) -> "VisionOnce":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        fresh = {"known": WeakIdKeyDictionary(), "serving": None, "outputs": None}
        for name, value in vars(self).items():
            setattr(other, name, fresh[name] if name in fresh else copy.deepcopy(value, memo))
        return other

    def restore(self) -> None:
        """Remove the wrappers."""
        del self.backbone.get_image_features, self.tower.forward
        delattr(self.backbone, HANDLE)

    def features(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's features of every image, computed once for equal images.

        Args:
            *args: Positional arguments of the backbone's method.
            **kwargs: Keyword arguments of the backbone's method.
        """
        kwargs |= dict(zip(self.signature, args, strict=False))
        pixels = kwargs.get("pixel_values")
        if (
            not isinstance(pixels, Tensor)
            or not len(pixels)
            or kwargs.get("return_dict") is False
            or (self.tower.training and any(active_dropout(m) for m in self.tower.modules()))
        ):
            return self.plain_features(**kwargs)
        kwargs["return_dict"] = True
        groups = self._groups(kwargs)
        outputs = None if pixels.requires_grad else self._outputs(groups)
        self.serving, self.outputs = groups, outputs
        try:
            features = self.plain_features(**kwargs | groups.arguments)
        finally:
            self.serving = self.outputs = None
        if outputs is not None:
            # transformers adds hooks in a tower's first pass, so the state is computed again.
            groups.kept[self.state()] = outputs
        if len(groups.first) == len(groups.group):
            return features
        pooled = features.pooler_output
        if len(pooled) != len(groups.first):
            return self.plain_features(**kwargs)
        of_all = pooled[groups.group] if isinstance(pooled, Tensor) else _each(pooled, groups.group)
        return BaseModelOutputWithPooling(pooler_output=of_all)

    def _groups(self, arguments: dict[str, Any]) -> ImageGroups:
        """The groups of a batch's images, computed once per pixel tensor.

        Args:
            arguments: Arguments of the backbone's method. A tensor with one entry for each image
                belongs to the images.
        """
        pixels: Tensor = arguments["pixel_values"]
        companions = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value is not pixels and value.ndim
        }
        if pixels.is_inference():  # an inference tensor has no version counter
            return _grouped(pixels, companions)
        state, groups = self.known.get(pixels, (None, None))
        if state != (current := state_of([pixels, *companions.values()])):
            groups = _grouped(pixels, companions)
            self.known[pixels] = (current, groups)
        return groups

    def _outputs(self, groups: ImageGroups) -> dict | None:
        """What is kept of the tower for these images; None if nothing may be kept.

        The caller stores a new dictionary in `groups.kept` only after the pass, so that a pass
        that was interrupted leaves nothing.
        """
        return groups.kept.get(self.state(), {}) if self.frozen() else None

    def frozen(self) -> bool:
        """Whether no parameter of the tower trains, so that its output cannot change."""
        return not any(p.requires_grad for p in self.tower.parameters())

    def state(self) -> tuple:
        """What the tower's output depends on besides its input: its state, and autocast."""
        device = next(self.tower.parameters()).device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (autocast, tower_state(self.tower))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's forward. A frozen tower's output is stored, and reused for equal calls.

        Args:
            *args: Positional arguments of the tower's forward, the images first.
            **kwargs: Keyword arguments of the tower's forward.
        """
        # Tensors depend on the images only, but a `TowerCache` may hand over a part of them.
        inputs = [*args, *(value for _, value in sorted(kwargs.items()))]
        key = tuple(x.shape if isinstance(x, Tensor) else repr(x) for x in inputs)
        if self.outputs is not None and key in self.outputs:
            output = self.outputs[key]
        else:
            self.images_run += len(self.serving.first) if self.serving else len(inputs[0])
            if self.outputs is None:
                return self.plain_forward(*args, **kwargs)
            with torch.no_grad():
                output = self.outputs[key] = self.plain_forward(*args, **kwargs)
        return type(output)(**output)  # a shallow copy, because the caller changes attributes


def _each(features: Sequence[Tensor], group: list[int]) -> list[Tensor]:
    """The features of every image.

    Args:
        features: Features of each distinct image.
        group: For each image the index of its features.
    """
    return [features[g] for g in group]


def _grouped(pixels: Tensor, companions: dict[str, Tensor]) -> ImageGroups:
    """The groups of images.

    Args:
        pixels: Images (count, ...).
        companions: Further tensor arguments of the backbone's method, by name.
    """
    along = {name: value for name, value in companions.items() if len(value) == len(pixels)}
    groups = group_images(list(pixels), list(along.values()))
    if len(groups.first) == len(groups.group):
        return groups
    chosen = {name: value[groups.first] for name, value in along.items()}
    return dataclasses.replace(groups, arguments={"pixel_values": pixels[groups.first], **chosen})


# Attributes of PEFT's layers that change the layers' output. Tensors are not listed here.
SWITCHES = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


def state_of(tensors: Iterable[Tensor]) -> tuple:
    """A value that changes if one of the tensors changes: versions, addresses, dtypes and sums.

    A tensor's version counts changes in place, but not changes through `.data`. Changes
    through `.data` show in the sum.
    """
    tensors = list(tensors)
    sums = [t.detach().sum(dtype=torch.float64) for t in tensors if t.is_floating_point()]
    return (
        tuple((t._version, t.data_ptr(), t.dtype, t.device) for t in tensors),
        tuple(torch.stack(sums).tolist()) if sums else (),
    )


def tower_state(tower: nn.Module) -> tuple:
    """Everything that a frozen tower's output depends on, besides its input.

    Args:
        tower: The tower. If it has PEFT's layers, the result also holds their active adapters.
    """
    # This function runs in every pass of the model, so it walks over the modules only once.
    tensors: dict[int, Tensor] = {}
    switches: list[object] = []
    forwards: list[object] = []
    for module in tower.modules():
        values = vars(module)
        for held in (module._parameters, module._buffers):
            tensors.update((id(tensor), tensor) for tensor in held.values() if tensor is not None)
        switches += [
            (name, repr(values[name])) for name in SWITCHES if values.get(name) is not None
        ]
        if module is not tower:
            forwards += [id(values.get("forward")), *module._forward_hooks]
            forwards += ["before", *module._forward_pre_hooks]
    attention = getattr(getattr(tower, "config", None), "_attn_implementation", None)
    return state_of(tensors.values()), tuple(switches), tuple(forwards), attention


def active_dropout(module: nn.Module) -> bool:
    """Whether a module applies dropout in training mode."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any(
        isinstance(rate := getattr(module, name, 0.0), float) and rate > 0
        for name in ("attention_dropout", "dropout")
    )
