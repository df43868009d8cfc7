"""Run each distinct image of a batch through the vision tower once.

The outputs are kept as long as the batch's pixel tensor exists.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class ImageGroups:
    """The images of a batch, grouped by equal pixels."""

    first: list[int]
    """For each group the index of its first image, in order of appearance."""
    group: list[int]
    """For each image the number of its group, which is an index into `first`."""
    pixels: Tensor
    """The distinct images (groups, ...). The other dimensions are those of the batch."""
    sizes: Tensor | None
    """`image_sizes` of the distinct images (groups, 2); None if the model family has no sizes."""
    outputs: dict = field(default_factory=dict)
    """Outputs of the frozen tower for `pixels`, keyed by the tower's other arguments."""


def group_images(pixels: Tensor, sizes: Tensor | None) -> ImageGroups:
    """Group equal images. All pixels are compared; checksums only select the candidates.

    Args:
        pixels: Images (count, ...).
        sizes: Heights and widths before preprocessing (count, 2), in pixels. Equal images also have
            equal sizes. None if the model family has no sizes.
    """
    with torch.no_grad():
        flat = pixels.detach().flatten(1)
        sums = torch.stack(
            [f.sum(1, dtype=torch.float64) for f in (flat, flat[:, ::7])], 1
        ).tolist()
        shapes = [()] * len(sums) if sizes is None else [tuple(s) for s in sizes.tolist()]
        first: list[int] = []
        group: list[int] = []
        by_checksum: dict[tuple, list[int]] = {}
        for i, checksum in enumerate(zip(map(tuple, sums), shapes, strict=True)):
            candidates = by_checksum.setdefault(checksum, [])
            equal = next((g for g in candidates if torch.equal(pixels[first[g]], pixels[i])), None)
            if equal is None:
                equal = len(first)
                candidates.append(equal)
                first.append(i)
            group.append(equal)
    if len(first) == len(group):
        return ImageGroups(first, group, pixels, sizes)
    indices = torch.tensor(first, device=pixels.device)
    distinct_sizes = None if sizes is None else sizes[indices.to(sizes.device)]
    return ImageGroups(first, group, pixels[indices], distinct_sizes)


class VisionMemory:
    """The groups and tower outputs of each pixel tensor, kept as long as the tensor exists.

    Policy and reference get the same pixel tensor, and so do PPO's passes over a rollout. The
    frozen tower therefore runs in the first pass only. The projector runs in every pass, because it
    trains.
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
        """Restore the tower's forward."""
        del self.tower.forward

    def of(self, pixels: Tensor, sizes: Tensor | None) -> ImageGroups:
        """The groups of a batch's images, computed once per tensor.

        Args:
            pixels: Images (count, ...).
            sizes: Heights and widths before preprocessing (count, 2), in pixels; or None.
        """
        if pixels.is_inference():  # an inference tensor has no version counter
            return group_images(pixels, sizes)
        state, groups = self.known.get(pixels, (None, None))
        if state != (current := state_of([pixels])):
            groups = group_images(pixels, sizes)
            self.known[pixels] = (current, groups)
        return groups

    @contextlib.contextmanager
    def serve(self, groups: ImageGroups) -> Iterator[None]:
        """A context in which the tower's outputs are kept in `groups`.

        The caller gives `groups.pixels` to the tower.
        """
        self.serving = groups
        try:
            yield
        finally:
            self.serving = None

    def frozen(self) -> bool:
        """Whether the tower's output cannot change: no parameter trains, and no dropout is on."""
        return not any(p.requires_grad for p in self.tower.parameters()) and not (
            self.tower.training and any(active_dropout(m) for m in self.tower.modules())
        )

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The tower's forward. A frozen tower's output is stored, and reused for equal calls."""
        groups = self.serving
        if groups is None or pixel_values.requires_grad or not self.frozen():
            self.images_run += len(pixel_values)
            return self.plain_forward(pixel_values, *args, **kwargs)
        key = self._key(pixel_values, args, kwargs)
        if key not in groups.outputs:
            self.images_run += len(pixel_values)
            with torch.no_grad():
                output = self.plain_forward(pixel_values, *args, **kwargs)
            # transformers adds hooks in a tower's first pass, so the key is computed again.
            groups.outputs[key := self._key(pixel_values, args, kwargs)] = output
        output = groups.outputs[key]
        return type(output)(**output)  # a shallow copy, because the caller changes attributes

    def _key(self, pixels: Tensor, args: tuple, kwargs: dict) -> tuple:
        """What the output depends on besides the pixels: other arguments, autocast and the tower.

        Args:
            pixels: The images. Only their device counts.
            args: The other positional arguments of the tower's forward.
            kwargs: The keyword arguments of the tower's forward.
        """
        device = pixels.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (repr(args), repr(sorted(kwargs.items())), autocast, tower_state(self.tower))


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
