"""The arguments of a text model, token by token: how rows compare, and how they are packed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from spavl_lib.modelling.speed.prefix_tree import PrefixTree
from spavl_lib.modelling.speed.token_keys import equal_rows, hash_rows, mix


class NotShared(Exception):
    """Raised if a batch cannot be packed, so that the text model's own forward runs.

    The message is the reason. An empty message means that no warning is needed.
    """


class TextBatch:
    """A batch of a text model.

    Args:
        arguments: Keyword arguments of the text model's forward.
        ids: Token ids (rows, length). Two ids may have one embedding, but each has its own
            gradient, so that only tokens of one id are computed together.
        config: Config of the text model.

    Raises:
        NotShared: The batch cannot be packed.
    """

    def __init__(self, arguments: dict[str, Any], ids: Tensor | None, config: PreTrainedConfig):
        self.arguments, self.config = arguments, config
        self.embeddings: Tensor = arguments["inputs_embeds"]
        self.rows, self.length = self.embeddings.shape[:2]
        if ids is None or ids.shape != (self.rows, self.length):
            raise NotShared("the batch holds embeddings instead of token ids")
        self.real = self._real()
        self.first, self.counts = self.real.argmax(1), self.real.sum(1)
        if (self.counts == 0).any():
            raise NotShared("a row holds only padding")
        columns, first = np.arange(self.length), self.first[:, None]
        if (self.real != ((columns >= first) & (columns < first + self.counts[:, None]))).any():
            raise NotShared("the attention mask has holes")
        self.positions = self._positions()
        # What a text model gets for a token: integers, and rows of tensors.
        on_device = torch.stack([hash_rows(self.embeddings), ids])
        self.hashed, *self.numbers = on_device.cpu().numpy()
        if self.positions is not None:
            self.numbers += list(self.positions - self.positions.min((1, 2), keepdims=True))

    def _real(self) -> np.ndarray:
        """A mask (rows, length), True for tokens and False for padding."""
        mask = self.arguments.get("attention_mask")
        shape = (self.rows, self.length)
        if mask is None:
            return np.ones(shape, bool)
        if not isinstance(mask, Tensor) or mask.shape != shape:
            raise NotShared(
                f"the attention mask has shape {tuple(getattr(mask, 'shape', ()))}, "
                "not (rows, length)"
            )
        return mask.detach().cpu().numpy() > 0

    def _positions(self) -> np.ndarray | None:
        """Positions (axes, rows, length), int64, that start alike in every row; None if not given.

        Rotary positions count by their differences only. Each row's first position is subtracted,
        because a packed row holds tokens of rows with different padding.
        """
        given = self.arguments.get("position_ids")
        if given is None:
            return None
        axes = (given if given.ndim == 3 else given[None]).expand(-1, self.rows, -1)
        axes = axes.cpu().numpy().astype(np.int64)
        steps = np.diff(axes[0], axis=1)
        if self.arguments.get("attention_mask") is None and (steps != 1).any():
            # transformers takes each place where positions start anew for another sequence.
            raise NotShared("position_ids do not count up one by one")
        start = axes[:, np.arange(self.rows), self.first, None]
        return axes - start + start.min(axis=1, keepdims=True)

    def keys(self) -> list[np.ndarray]:
        """For each row the keys (tokens,) of its tokens, without padding."""
        keys = mix([self.hashed, *self.numbers])
        return [keys[row, real] for row, real in enumerate(self.real)]

    def sources(self, tree: PrefixTree) -> np.ndarray:
        """For each packed token (packed,) the place in the flattened batch that it is taken from.

        Args:
            tree: The tree of the keys.

        Raises:
            NotShared: Two tokens have one key, but the text model gets different values for them.
        """
        row, offset = tree.sources.T
        sources = row * self.length + self.first[row] + offset
        real = np.flatnonzero(self.real)
        taken = sources[np.concatenate(tree.places)]
        one, other = real[real != taken], taken[real != taken]
        equal = all((n.ravel()[one] == n.ravel()[other]).all() for n in self.numbers)
        on_device = [torch.from_numpy(x).to(self.embeddings.device) for x in (one, other)]
        if not equal or not equal_rows(self.embeddings.flatten(0, 1), *on_device):
            raise NotShared("two different tokens have the same hash")
        return sources

    def packed(self, sources: np.ndarray, tree: PrefixTree) -> dict[str, Any]:
        """The arguments of the text model for the packed row, except mask and cache.

        Args:
            sources: See `sources`.
            tree: The tree of the keys.
        """
        index = torch.from_numpy(sources).to(self.embeddings.device)
        packed = self.arguments | {"inputs_embeds": _select(self.embeddings, index)}
        if self.positions is None:
            positions = torch.from_numpy(tree.positions.copy())[None].to(index)
        else:
            flat = self.positions.reshape(len(self.positions), 1, -1)
            positions = torch.from_numpy(flat[:, :, sources]).to(index)
            positions = positions if self.arguments["position_ids"].ndim == 3 else positions[0]
        return packed | {"position_ids": positions}

    def places(self, tree: PrefixTree) -> Tensor:
        """For each place of the flattened batch its index in the packed row (rows * length,).

        Padding gets index 0. Its hidden states are not used.

        Args:
            tree: The tree of the keys.
        """
        places = np.zeros(self.real.shape, dtype=np.int64)
        places[self.real] = np.concatenate(tree.places)
        return torch.from_numpy(places.ravel()).to(self.embeddings.device)


def _select(values: Tensor, index: Tensor) -> Tensor:
    """Values (1, count, ...) at places of the flattened batch.

    Args:
        values: (rows, length, ...).
        index: Places (count,).
    """
    return values.flatten(0, 1).index_select(0, index)[None]
