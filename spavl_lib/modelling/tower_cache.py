"""A frozen vision tower's outputs, kept for the rows of one rollout.

PPO reads every picture in generation, under policy, reference, value and reward model, and again in
each inner epoch. The tower never trains, so all of that is one computation. What is kept is the
tower's output *before* the projector, which trains and differs by role.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


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
        config = model.config
        layers = getattr(config, "vision_feature_layer", None)
        self.layers = [layers] if isinstance(layers, int) else list(layers or [])
        self.works = config.model_type in ("llava", "llava_next") and bool(self.layers)
        self.pinpoints = getattr(config, "image_grid_pinpoints", None)
        self.tile = getattr(getattr(config, "vision_config", None), "image_size", 0)
        self.towers = towers
        self.hits = self.misses = 0
        self._kept: dict[int, dict[int, Tensor]] = {}
        self._rows: list[int] = []
        self._entries: list[int] = []

    @contextlib.contextmanager
    def rollout(self) -> Iterator["TowerCache"]:
        """Keep outputs until the block ends."""
        plain = [tower.forward for tower in self.towers]
        if self.works:
            for tower, forward in zip(self.towers, plain, strict=True):
                tower.forward = self._standing_in(forward)
        try:
            yield self
        finally:
            if self.works:
                for tower in self.towers:
                    del tower.forward  # the class's own comes back
            self._kept.clear()

    @contextlib.contextmanager
    def rows(self, rows: list[int], batch: dict[str, Any]) -> Iterator[None]:
        """Say whose pictures the next forward holds, in order.

        Args:
            rows: Numbers of the rollout's rows that have a picture.
            batch: Their image tensors.
        """
        self._rows, self._entries = rows, self._entries_of(rows, batch)
        try:
            yield
        finally:
            self._rows = []

    def _entries_of(self, rows: list[int], batch: dict[str, Any]) -> list[int]:
        """How many tower inputs each row has: one, or its tiles."""
        if "image_sizes" not in batch or self.pinpoints is None:
            return [1] * len(rows)
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return [
            image_size_to_num_patches(size, self.pinpoints, self.tile)
            for size in batch["image_sizes"]
        ]

    def _standing_in(self, forward: Any) -> Any:
        def cached(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = self._rows
            if not rows:
                return forward(pixel_values, *args, **kwargs)
            if sum(self._entries) != len(pixel_values):
                raise AssertionError(
                    f"{len(pixel_values)} pictures for {len(rows)} rows of {self._entries}"
                )
            if not all(row in self._kept for row in rows):
                self.misses += len(rows)
                self._keep(forward, pixel_values, args, kwargs)
            else:
                self.hits += len(rows)
            kept = {
                layer: torch.cat([self._kept[row][layer] for row in rows]) for layer in self.layers
            }
            return BaseModelOutputWithPooling(hidden_states=_Layers(kept))

        return cached

    @torch.no_grad()
    def _keep(self, forward: Any, pixel_values: Tensor, args: tuple, kwargs: dict) -> None:
        output = forward(pixel_values, *args, **kwargs)
        parts = {layer: output.hidden_states[layer].split(self._entries) for layer in self.layers}
        for place, row in enumerate(self._rows):
            self._kept[row] = {layer: part[place].clone() for layer, part in parts.items()}
