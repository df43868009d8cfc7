"""Compute the visual features of each distinct image of a batch once.

A frozen tower's outputs are kept as long as the batch's pixel tensor exists.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

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
    of_rows: list[int] | None = None
    """The number of images of each row, where the backbone returns features by row."""
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
        # Where a merger that trains lies inside the tower, the blocks before it are kept one by
        # one. Nobody reads the other blocks' outputs if the last block is kept.
        blocks = list(getattr(self.tower, "blocks", ()))
        inside = [m for name, m in self.tower.named_children() if "merger" in name]
        blocks, self.mergers = (blocks, inside) if blocks and inside else ([], [])
        self.parts = blocks or [self.tower]
        deep = getattr(self.tower, "deepstack_visual_indexes", ()) if blocks else ()
        self.read = {len(self.parts) - 1, *deep}
        self.plain_forwards = [part.forward for part in self.parts]

        # `generate` reads the signature of this method.
        @functools.wraps(type(backbone).get_image_features)
        def image_features(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, HANDLE).features(*args, **kwargs)

        backbone.get_image_features = types.MethodType(image_features, backbone)
        for number, part in enumerate(self.parts):
            part.forward = functools.partial(self.run, number)
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
        del self.backbone.get_image_features
        for part in self.parts:
            del part.forward
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
        if (groups := self._groups(kwargs)) is None:
            return self.plain_features(**kwargs)
        outputs = None if pixels.requires_grad else self._outputs(groups)
        new = not outputs
        self.serving, self.outputs = groups, outputs
        try:
            features = self.plain_features(**kwargs | groups.arguments)
        finally:
            self.serving = self.outputs = None
        if outputs and new:
            # transformers adds hooks in a tower's first pass, so the state is computed again.
            groups.kept[self.state()] = outputs
        if len(groups.first) == len(groups.group):
            return features
        if len(features.pooler_output) != len(groups.first):
            return self.plain_features(**kwargs)
        return _of_all_images(features, groups)

    def _groups(self, arguments: dict[str, Any]) -> ImageGroups | None:
        """The groups of a batch's images, computed once per pixel tensor.

        Args:
            arguments: Arguments of the backbone's method. The tensors among them belong to the
                images.

        Returns:
            The groups; None if the tensors have an unknown form.
        """
        pixels: Tensor = arguments["pixel_values"]
        companions = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value is not pixels
        }
        # An inference tensor has no version counter, and a graph serves one backward pass.
        if pixels.is_inference() or pixels.requires_grad:
            return self._grouped(pixels, companions)
        state, groups = self.known.get(pixels, (None, None))
        if state != (current := state_of([pixels, *companions.values()])):
            groups = self._grouped(pixels, companions)
            self.known[pixels] = (current, groups)
        return groups

    def _grouped(self, pixels: Tensor, companions: dict[str, Tensor]) -> ImageGroups | None:
        """Group images, whatever the form in which a family takes them.

        Args:
            pixels: Images (count, ...); the patches of all images (patches, ...) if `companions`
                has `image_grid_thw`; or (rows, images, ...) if the backbone's method has a
                `pixel_attention_mask`.
            companions: Further tensor arguments of the backbone's method, by name.
        """
        names, of_rows = list(companions), None
        if names == ["image_grid_thw"]:
            images = pixels.split(companions["image_grid_thw"].prod(-1).tolist())
        elif pixels.ndim == 5 and "pixel_attention_mask" in self.signature:
            # A row with fewer images than others is filled up with images of zeros.
            present = (pixels != 0).flatten(2).any(2)
            of_rows = present.sum(1).tolist()
            images = pixels[present]
            companions = {name: value[present] for name, value in companions.items()}
        else:
            images = pixels
        if not len(images) or any(not c.ndim or len(c) != len(images) for c in companions.values()):
            return None
        groups = group_images(list(images), list(companions.values()))
        if len(groups.first) == len(groups.group):
            return groups
        chosen = {name: value[groups.first] for name, value in companions.items()}
        if isinstance(images, tuple):
            chosen["pixel_values"] = torch.cat([images[i] for i in groups.first])
        else:
            chosen["pixel_values"] = images[groups.first]
        if of_rows is not None:  # one image in each row
            chosen = {name: value[:, None] for name, value in chosen.items()}
        return dataclasses.replace(groups, arguments=chosen, of_rows=of_rows)

    def _outputs(self, groups: ImageGroups) -> dict | None:
        """What is kept of the tower for these images; None if nothing may be kept.

        The caller adds a new dictionary to `groups.kept` after the pass only, so that a pass that
        was interrupted leaves nothing.
        """
        frozen = not any(
            p.requires_grad
            for module in modules_without(self.tower, self.mergers)
            for p in module.parameters(recurse=False)
        )
        return groups.kept.get(self.state(), {}) if frozen else None

    def state(self) -> tuple:
        """What the tower's output depends on besides its input: its state, and autocast."""
        device = next(self.tower.parameters()).device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (autocast, tower_state(self.tower, self.mergers))

    def run(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """The forward of a part of the tower. Outputs of a frozen part are stored, and reused.

        Args:
            number: Index of the part.
            *args: Positional arguments of the part's forward, the images or hidden states first.
            **kwargs: Keyword arguments of the part's forward.
        """
        inputs = [*args, *(value for _, value in sorted(kwargs.items()))]
        key = (number, *map(_description, inputs))
        if self.outputs is not None and key in self.outputs:
            output = self.outputs[key]
            if output is None:
                return args[0]
        else:
            if number == 0:
                self.images_run += len(self.serving.first) if self.serving else len(inputs[0])
            plain = self.plain_forwards[number]
            if self.outputs is None:
                return plain(*args, **kwargs)
            with torch.no_grad():
                output = plain(*args, **kwargs)
            self.outputs[key] = output if number in self.read or not args else None
        # A shallow copy, because the caller changes attributes.
        return type(output)(**output) if isinstance(output, ModelOutput) else output


def _description(value: Any) -> Any:
    """What an argument of the tower adds to the images: a tensor depends on them alone.

    Its shape counts, because a `TowerCache` may hand over a part of the images.
    """
    if isinstance(value, Tensor):
        return value.shape
    return tuple(map(_description, value)) if isinstance(value, list | tuple) else repr(value)


def _of_all_images(features: Any, groups: ImageGroups) -> Any:
    """The output of `get_image_features` for every image.

    Args:
        features: The output for the distinct images.
        groups: The groups of the images.
    """
    pooled, group = features.pooler_output, groups.group
    if isinstance(pooled, Tensor):
        return BaseModelOutputWithPooling(pooler_output=pooled[group])
    pooled = [pooled[g] for g in group]
    if groups.of_rows is not None:
        empty, images = pooled[0][:0], iter(pooled)
        pooled = [torch.cat([empty, *itertools.islice(images, count)]) for count in groups.of_rows]
    levels = getattr(features, "deepstack_features", None)
    if levels is None:
        return BaseModelOutputWithPooling(pooler_output=pooled)
    levels = [[level[g] for g in group] for level in levels]
    return type(features)(pooler_output=pooled, deepstack_features=levels)


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


def modules_without(tower: nn.Module, children: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of a tower, without some of its children and without all that is inside them."""
    left_out = {module for child in children for module in child.modules()}
    return [module for module in tower.modules() if module not in left_out]


def tower_state(tower: nn.Module, without: Iterable[nn.Module] = ()) -> tuple:
    """Everything that a frozen tower's output depends on, besides its input.

    Args:
        tower: The tower. If it has PEFT's layers, the result also holds their active adapters.
        without: Children on which the output does not depend.
    """
    # This function runs in every pass of the model, so it walks over the modules only once.
    tensors: dict[int, Tensor] = {}
    switches: list[object] = []
    forwards: list[object] = []
    for module in modules_without(tower, without):
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
