"""Keep the frozen vision tower's outputs for the images of one rollout.

PPO needs the tower's output for every image many times: in generation, for policy, reference, value
and reward model, and again in each inner epoch. The tower never trains, so one computation is
enough. The cache holds the tower's output and not the projector's, because the projector trains and
differs by role. All questions about one image share a cache entry. With shared prefixes the tower
gets each distinct image of a batch once, and the cache works too.
"""

import contextlib
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spavl_lib.modelling.families import family_of, packs_images


class _Layers:
    """Hidden states of the cached layers, indexed by the layer numbers that the model uses."""

    def __init__(self, kept: dict[int, Tensor]):
        self.kept = kept

    def __getitem__(self, layer: int) -> Tensor:
        return self.kept[layer]


class _Rows(threading.local):
    """The rows of a batch. Each thread has its own: two roles may compute at the same time."""

    images: Sequence[Hashable] = ()
    inputs: Sequence[int] = ()  # for each image


class TowerCache:
    """A replacement of the towers' forward during a rollout.

    The cache works for families whose model selects hidden states of the tower
    (`Family.picks_hidden_states`). In other families the tower runs each time.

    Args:
        model: A model of the rollout. Its config says which of the tower's layers are used.
        towers: Every tower that gets the rollout's images. All must hold the same frozen weights.
    """

    def __init__(self, model: nn.Module, towers: list[nn.Module]):
        self.family, self.config = family_of(model), model.config
        layers = getattr(self.config, "vision_feature_layer", None)
        self.layers = [layers] if isinstance(layers, int) else list(layers or [])
        self.works = (
            self.family.picks_hidden_states and bool(self.layers) and not packs_images(self.config)
        )
        self.towers = towers
        self.hits = self.misses = 0
        self._kept: dict[Hashable, dict[int, Tensor]] = {}
        self._rows = _Rows()

    @contextlib.contextmanager
    def rollout(self) -> Iterator["TowerCache"]:
        """A context that caches outputs. The cache is emptied when the context ends."""
        earlier_overrides = [vars(tower).get("forward") for tower in self.towers]
        plain = [tower.forward for tower in self.towers]
        if self.works:
            for tower, forward in zip(self.towers, plain, strict=True):
                tower.forward = self._cached(forward)
        try:
            yield self
        finally:
            if self.works:
                for tower, forward in zip(self.towers, earlier_overrides, strict=True):
                    del tower.forward  # the class's method is in effect again
                    if forward is not None:
                        tower.forward = forward
            self._kept.clear()

    @contextlib.contextmanager
    def rows(self, images: Sequence[Hashable], batch: dict[str, Any]) -> Iterator[None]:
        """A context that says which images its forward passes get.

        Args:
            images: A key for each image. Equal keys mean equal pixels. Without keys nothing is
                cached.
            batch: The image tensors of these images.
        """
        self._rows.images = images
        self._rows.inputs = self.family.tower_inputs(self.config, batch, len(images))
        try:
            yield
        finally:
            self._rows.images = []

    def _cached(self, forward: Any) -> Any:
        def cached(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._rows.images:
                return forward(pixel_values, *args, **kwargs)
            images = self._images_in(len(pixel_values))
            missing, start = {}, 0
            for image, count in images:
                if image not in self._kept and image not in missing:
                    missing[image] = slice(start, start + count)
                start += count
            self.misses += len(missing)
            self.hits += len(images) - len(missing)
            if missing:
                self._keep(forward, pixel_values, missing, args, kwargs)
            kept = {
                layer: torch.cat([self._kept[image][layer] for image, _ in images])
                for layer in self.layers
            }
            return BaseModelOutputWithPooling(hidden_states=_Layers(kept))

        return cached

    def _images_in(self, count: int) -> list[tuple[Hashable, int]]:
        """The images of one call of the tower, each with its number of inputs.

        Args:
            count: Number of inputs in the call.

        Raises:
            AssertionError: The number fits neither the images of all rows nor the distinct images.
        """
        of_rows = list(zip(self._rows.images, self._rows.inputs, strict=True))
        for images in (of_rows, list(dict(of_rows).items())):
            if sum(number for _, number in images) == count:
                return images
        raise AssertionError(f"the tower got {count} inputs, but the rows have {self._rows.inputs}")

    @torch.no_grad()
    def _keep(
        self,
        forward: Any,
        pixels: Tensor,
        missing: dict[Hashable, slice],
        args: tuple,
        kwargs: dict,
    ) -> None:
        """Run the tower on the missing images, and cache the layers that the model uses.

        Args:
            forward: The tower's forward without the cache.
            pixels: Inputs of the call (inputs, ...).
            missing: For each missing image its slice of `pixels`.
            args: Further positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        output = forward(torch.cat([pixels[place] for place in missing.values()]), *args, **kwargs)
        sizes = [place.stop - place.start for place in missing.values()]
        parts = {layer: output.hidden_states[layer].split(sizes) for layer in self.layers}
        for n, image in enumerate(missing):
            self._kept[image] = {layer: part[n].clone() for layer, part in parts.items()}
