"""A frozen vision tower's outputs, kept for the pictures of one rollout.

PPO reads every picture in generation, under policy, reference, value and reward model, and again in
each inner epoch. The tower never trains, so all of that is one computation. What is kept is the
tower's output *before* the projector, which trains and differs by role. Questions about the same
picture share it, also under shared prefixes, where the tower sees each picture of a batch once.
"""

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spavl_lib.modelling.families import family_of


class _Layers:
    """Hidden states of the layers that were kept, under the indices the model asks for."""

    def __init__(self, kept: dict[int, Tensor]):
        self.kept = kept

    def __getitem__(self, layer: int) -> Tensor:
        return self.kept[layer]


class TowerCache:
    """Stands in for the towers' forward while a rollout lasts.

    Works where the tower gives one output per picture (or per tile of one) and the model picks
    hidden states from it: LLaVA-1.5 and LLaVA-NeXT. Other families run their tower each time.

    Args:
        model: A model of the rollout; its config says which layers are used.
        towers: Every tower that sees the rollout's pictures; all must hold the same frozen weights.
    """

    def __init__(self, model: nn.Module, towers: list[nn.Module]):
        self.family, self.config = family_of(model), model.config
        layers = getattr(self.config, "vision_feature_layer", None)
        self.layers = [layers] if isinstance(layers, int) else list(layers or [])
        self.works = self.family.picks_hidden_states and bool(self.layers)
        self.towers = towers
        self.hits = self.misses = 0
        self._kept: dict[Hashable, dict[int, Tensor]] = {}
        self._pictures: list[Hashable] = []
        self._entries: list[int] = []

    @contextlib.contextmanager
    def rollout(self) -> Iterator["TowerCache"]:
        """Keep outputs until the block ends."""
        own = [vars(tower).get("forward") for tower in self.towers]
        plain = [tower.forward for tower in self.towers]
        if self.works:
            for tower, forward in zip(self.towers, plain, strict=True):
                tower.forward = self._standing_in(forward)
        try:
            yield self
        finally:
            if self.works:
                for tower, forward in zip(self.towers, own, strict=True):
                    del tower.forward  # the class's own comes back
                    if forward is not None:
                        tower.forward = forward
            self._kept.clear()

    @contextlib.contextmanager
    def rows(self, pictures: list[Hashable], batch: dict[str, Any]) -> Iterator[None]:
        """Say which pictures the next forward holds, row by row.

        Args:
            pictures: A key for each row that has a picture; equal keys mean equal pixels.
            batch: Their image tensors.
        """
        self._pictures = pictures
        self._entries = self.family.tower_inputs(self.config, batch, len(pictures))
        try:
            yield
        finally:
            self._pictures = []

    def _standing_in(self, forward: Any) -> Any:
        def cached(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._pictures:
                return forward(pixel_values, *args, **kwargs)
            entries = self._inputs(len(pixel_values))
            missing, at = {}, 0
            for picture, count in entries:
                if picture not in self._kept and picture not in missing:
                    missing[picture] = slice(at, at + count)
                at += count
            self.misses += len(missing)
            self.hits += len(entries) - len(missing)
            if missing:
                self._keep(forward, pixel_values, missing, args, kwargs)
            kept = {
                layer: torch.cat([self._kept[picture][layer] for picture, _ in entries])
                for layer in self.layers
            }
            return BaseModelOutputWithPooling(hidden_states=_Layers(kept))

        return cached

    def _inputs(self, count: int) -> list[tuple[Hashable, int]]:
        """The pictures the tower was handed, each with its number of inputs.

        Raises:
            AssertionError: They are neither all of the rows' nor each of them once.
        """
        every = list(zip(self._pictures, self._entries, strict=True))
        for entries in (every, list(dict(every).items())):
            if sum(number for _, number in entries) == count:
                return entries
        raise AssertionError(f"{count} pictures for {len(every)} rows of {self._entries}")

    @torch.no_grad()
    def _keep(
        self,
        forward: Any,
        pixels: Tensor,
        missing: dict[Hashable, slice],
        args: tuple,
        kwargs: dict,
    ) -> None:
        output = forward(torch.cat([pixels[place] for place in missing.values()]), *args, **kwargs)
        sizes = [place.stop - place.start for place in missing.values()]
        parts = {layer: output.hidden_states[layer].split(sizes) for layer in self.layers}
        for n, picture in enumerate(missing):
            self._kept[picture] = {layer: part[n].clone() for layer, part in parts.items()}
