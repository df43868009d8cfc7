"""The arguments of a text model, token by token: how rows compare, and how they are packed."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from spavl_lib.modelling.speed.prefix_attention import layer_kinds
from spavl_lib.modelling.speed.prefix_tree import PrefixTree, Segment
from spavl_lib.modelling.speed.token_keys import close_blocks, equal_rows, hash_rows, mix

# Arguments of text models that this module packs.
HANDLED = (
    "inputs_embeds", "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache",
    "visual_pos_masks", "deepstack_visual_embeds",
)  # fmt: skip
# Arguments that attention functions read, whether or not they are in a text model's signature.
PACKED_ROWS = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_bias",
)  # fmt: skip
BLOCKED = -1e4  # a number of a mask up to this one blocks, in every dtype


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
        causal: Whether the text model's layers are causal if no mask is given.
        names: Names of the arguments in the signature of the text model's forward.

    Raises:
        NotShared: The batch cannot be packed.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        ids: Tensor | None,
        config: PreTrainedConfig,
        causal: bool,
        names: Collection[str],
    ):
        self.arguments = arguments
        self.embeddings: Tensor = arguments["inputs_embeds"]
        self.rows, self.length = self.embeddings.shape[:2]
        if ids is None or ids.shape != (self.rows, self.length):
            raise NotShared("the batch holds embeddings instead of token ids")
        self.ids = ids
        kinds = set(layer_kinds(config))
        self.seen = self._seen(kinds)
        if not causal and kinds - self.seen.keys():
            raise NotShared("no mask is given, and the text model is not causal by itself")
        self.real = self._real()
        self.first, self.counts = self.real.argmax(1), self.real.sum(1)
        if (self.counts == 0).any():
            raise NotShared("a row holds only padding")
        columns, first = np.arange(self.length), self.first[:, None]
        if (self.real != ((columns >= first) & (columns < first + self.counts[:, None]))).any():
            raise NotShared("the attention mask has holes")
        self.positions = self._positions()
        self.visual: Tensor | None = None
        levels = arguments.get("deepstack_visual_embeds")
        self.levels: list[Tensor] = [] if levels is None else list(levels)
        if (visual := arguments.get("visual_pos_masks")) is not None:
            self.visual = visual if visual.ndim == 2 else visual[..., 0]
            self.number = self.visual.flatten().cumsum(0) - 1  # index into each of `levels`
        self.tensors = {"inputs_embeds": self.embeddings, **self._row_tensors(names)}
        sights, self.reach = self._sights()
        numbers = torch.stack([*self._hashes(), ids, *sights])
        self.numbers = list(numbers.cpu().numpy())
        if self.positions is not None:
            self.numbers += list(self.positions)

    def _row_tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """Further arguments (rows, length, ...) of the text model.

        Args:
            names: Names in the signature of the text model's forward.
        """
        found = {}
        for name, value in self.arguments.items():
            is_tensor = isinstance(value, Tensor)
            if name in HANDLED or value is None or not (is_tensor or value):
                continue
            if name in PACKED_ROWS:
                raise NotShared(f"{name} is given")
            if name not in names or name == "return_dict":
                continue
            if not is_tensor or value.shape[:2] != (self.rows, self.length):
                raise NotShared(f"{name} is given")
            found[name] = value
        return found

    def _hashes(self) -> list[Tensor]:
        """Hashes (rows, length), int64, of the tensors that the text model gets for a token."""
        shape = (self.rows, self.length)
        hashes = [hash_rows(x.reshape(*shape, -1)) for x in self.tensors.values()]
        if self.visual is not None:
            hashes.append(self.visual.long())
            for level in self.levels:
                spread = torch.zeros_like(hashes[0])
                hashes.append(spread.masked_scatter(self.visual, hash_rows(level)))
        return hashes

    def _seen(self, kinds: set[str]) -> dict[str, Tensor]:
        """For each kind of layer the mask that was given, True where a token attends.

        A mask has the shape (rows, length, length). A kind without a mask is causal, as is each
        kind if the mask has the shape (rows, length).

        Args:
            kinds: The kinds of the text model's layers.
        """
        given = self.arguments.get("attention_mask")
        if given is None or (isinstance(given, Tensor) and given.ndim == 2):
            return {}
        table = given if isinstance(given, dict) else dict.fromkeys(kinds, given)
        seen = {}
        for kind in kinds:
            if (mask := table.get(kind)) is None:
                continue
            if not isinstance(mask, Tensor):
                raise NotShared(f"the attention mask is a {type(mask).__name__}")
            if mask.shape[1:] != (1, self.length, self.length):
                raise NotShared(f"the attention mask has shape {tuple(mask.shape)}")
            if mask.dtype != torch.bool:
                attends = mask == 0
                if not (attends | (mask <= BLOCKED)).all():
                    raise NotShared("the attention mask holds numbers that change scores")
                mask = attends
            seen[kind] = mask[:, 0].expand(self.rows, -1, -1)
        return seen

    def _real(self) -> np.ndarray:
        """A mask (rows, length), True for tokens and False for padding."""
        mask = self.arguments.get("attention_mask")
        if self.seen:  # padding is what no token attends to
            real = torch.stack([seen.any(1) for seen in self.seen.values()]).any(0)
            return real.cpu().numpy()
        if mask is None or isinstance(mask, dict):
            return np.ones((self.rows, self.length), bool)
        if mask.shape != (self.rows, self.length):
            raise NotShared(f"the attention mask has shape {tuple(mask.shape)}")
        return mask.detach().cpu().numpy() > 0

    def _sights(self) -> tuple[list[Tensor], np.ndarray | None]:
        """What the given masks say about each token. They stay on the device, being large.

        Returns:
            For each mask a hash (rows, length), int64, of the tokens to which a token attends,
            counted from the row's first token. Second, the index (rows, length), counted in the
            same way, of the last of them in any mask; None without a mask.
        """
        device = self.embeddings.device
        chance = torch.Generator().manual_seed(8)
        # Sums of these numbers are exact in 64-bit floats, in any order of addition.
        factors = torch.randint(1 << 38, (self.length,), generator=chance).double().to(device)
        columns = torch.arange(self.length, device=device)
        reach = torch.zeros(self.rows, self.length, dtype=torch.int64, device=device)
        hashes = []
        for seen in self.seen.values():
            hashed = torch.zeros_like(reach)
            for row, (first, count) in enumerate(zip(self.first, self.counts, strict=True)):
                span = slice(int(first), int(first + count))
                own = seen[row, span, span]
                hashed[row, span] = (own.double() @ factors[:count]).long()
                last = torch.where(own, columns[:count], 0).amax(1)
                reach[row, span] = torch.maximum(reach[row, span], last)
            hashes.append(hashed)
        return hashes, reach.cpu().numpy() if hashes else None

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
        if self.arguments.get("attention_mask") is None and len(axes) != 3 and (steps != 1).any():
            # Without a mask transformers takes any other step for the start of another sequence.
            # Only in positions of three axes (time, height, width) it does not look for one.
            raise NotShared("position_ids do not count up one by one")
        start = axes[:, np.arange(self.rows), self.first, None]
        return axes - start + start.min(axis=1, keepdims=True)

    def keys(self) -> list[np.ndarray]:
        """For each row the keys (tokens,) of its tokens, without padding."""
        keys = mix(self.numbers)
        rows = [keys[row, real] for row, real in enumerate(self.real)]
        if self.reach is None:
            return rows
        reach = [self.reach[row, real] for row, real in enumerate(self.real)]
        return [close_blocks(*of_row) for of_row in zip(rows, reach, strict=True)]

    def given_mask(self, kind: str, segment: Segment, row: int) -> Tensor | None:
        """The part (length, depth + length) of a given mask that a segment needs.

        Args:
            kind: Kind of layer. None is returned if it has no mask.
            segment: The segment.
            row: Number of a row that contains the segment.
        """
        if kind not in self.seen:
            return None
        first, stop = int(self.first[row]), int(self.first[row]) + segment.depth + segment.length
        return self.seen[kind][row, first + segment.depth : stop, first:stop]

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
        pair = [torch.from_numpy(x).to(self.embeddings.device) for x in (one, other)]
        for tensor in self.tensors.values():
            equal = equal and equal_rows(tensor.reshape(self.real.size, -1), *pair)
        if self.visual is not None:
            pair = [self.number[places[self.visual.flatten()[places]]] for places in pair]
            equal = equal and all(equal_rows(level, *pair) for level in self.levels)
        if not equal:
            raise NotShared("two different tokens have the same hash")
        return sources

    def packed(self, sources: np.ndarray, tree: PrefixTree) -> dict[str, Any]:
        """The arguments of the text model for the packed row, except mask and cache.

        Args:
            sources: See `sources`.
            tree: The tree of the keys.
        """
        index = torch.from_numpy(sources).to(self.embeddings.device)
        shape = (self.rows, self.length)
        packed = {
            name: value  # no layer reads a tensor of rows that is not in the signature
            for name, value in self.arguments.items()
            if name in HANDLED or getattr(value, "shape", ())[:2] != shape
        }
        packed |= {
            name: value.flatten(0, 1).index_select(0, index)[None]
            for name, value in self.tensors.items()
        }
        if self.visual is not None:
            visual = self.visual.flatten()[index]
            number = self.number[index[visual]]
            packed["visual_pos_masks"] = visual[None]
            if self.levels:
                packed["deepstack_visual_embeds"] = [x.index_select(0, number) for x in self.levels]
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
