"""Every picture through the vision tower once: within a batch, and again for the same tensor."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class ImageGroups:
    """Which images of a batch are the same picture."""

    first: list[int]
    """Index of one image for every distinct picture, in order of appearance."""
    group: list[int]
    """By image: its picture, as an index into `first`."""
    pixels: Tensor
    """The distinct pictures, (distinct, ...) as the batch has them."""
    sizes: Tensor | None
    """Their `image_sizes`, where the family has them."""
    outputs: dict = field(default_factory=dict)
    """What the frozen tower made of them."""


def group_images(pixels: Tensor, sizes: Tensor | None) -> ImageGroups:
    """Find equal images. Equal means every pixel: a checksum only picks whom to compare.

    Args:
        pixels: Images (count, ...).
        sizes: Original heights and widths (count, 2), part of what must be equal.
    """
    with torch.no_grad():
        flat = pixels.detach().flatten(1)
        marks = torch.stack(
            [f.sum(1, dtype=torch.float64) for f in (flat, flat[:, ::7])], 1
        ).tolist()
        size_marks = [()] * len(marks) if sizes is None else [tuple(s) for s in sizes.tolist()]
        first, group, known = [], [], {}
        for i, mark in enumerate(zip(map(tuple, marks), size_marks, strict=True)):
            candidates = known.setdefault(mark, [])
            same = next((g for g in candidates if torch.equal(pixels[first[g]], pixels[i])), None)
            if same is None:
                same = len(first)
                candidates.append(same)
                first.append(i)
            group.append(same)
    if len(first) == len(group):
        return ImageGroups(first, group, pixels, sizes)
    chosen = torch.tensor(first, device=pixels.device)
    picked = None if sizes is None else sizes[chosen.to(sizes.device)]
    return ImageGroups(first, group, pixels[chosen], picked)


class VisionMemory:
    """Groups and tower outputs by pixel tensor, for as long as that tensor lives.

    Policy and reference, and PPO's passes over a rollout, hand the same tensor in: the frozen tower
    runs for the first of them alone. The projector trains and is never remembered.
    """

    def __init__(self, tower: nn.Module):
        self.tower = tower
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.serving: ImageGroups | None = None
        self.images_run = 0
        self.plain_forward = tower.forward
        tower.forward = self.forward

    def __deepcopy__(self, memo: dict) -> "VisionMemory":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        fresh = {"known": WeakIdKeyDictionary(), "serving": None}
        for name, value in vars(self).items():
            setattr(other, name, fresh[name] if name in fresh else copy.deepcopy(value, memo))
        return other

    def restore(self) -> None:
        """Give the tower its own forward back."""
        del self.tower.forward

    def of(self, pixels: Tensor, sizes: Tensor | None) -> ImageGroups:
        """The groups of a batch's images, found once."""
        if pixels.is_inference():  # nothing counts its changes
            return group_images(pixels, sizes)
        version, groups = self.known.get(pixels, (None, None))
        if version != pixels._version:
            groups = group_images(pixels, sizes)
            self.known[pixels] = (pixels._version, groups)
        return groups

    @contextlib.contextmanager
    def serve(self, groups: ImageGroups) -> Iterator[None]:
        """While this lasts, the tower is asked for these groups' pictures."""
        self.serving = groups
        try:
            yield
        finally:
            self.serving = None

    def frozen(self) -> bool:
        """Whether the tower gives the same every time: nothing trains, no dropout."""
        return not any(p.requires_grad for p in self.tower.parameters()) and not (
            self.tower.training and any(active_dropout(m) for m in self.tower.modules())
        )

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The tower's forward; remembered where the tower is frozen."""
        groups = self.serving
        if groups is None or pixel_values.requires_grad or not self.frozen():
            self.images_run += len(pixel_values)
            return self.plain_forward(pixel_values, *args, **kwargs)
        # Autocast and the layers asked for are part of what an output depends on.
        key = (repr(args), repr(sorted(kwargs.items())), torch.is_autocast_enabled())
        if key not in groups.outputs:
            self.images_run += len(pixel_values)
            with torch.no_grad():
                groups.outputs[key] = self.plain_forward(pixel_values, *args, **kwargs)
        kept = groups.outputs[key]
        return type(kept)(**kept)  # a copy of the shell: the caller writes into it


def active_dropout(module: nn.Module) -> bool:
    """Whether a module drops anything in training mode."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any(
        isinstance(rate := getattr(module, name, 0.0), float) and rate > 0
        for name in ("attention_dropout", "dropout")
    )
