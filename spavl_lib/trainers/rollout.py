"""Rollouts: prompts, responses sampled from the policy, and tensors over the responses' tokens.

Gumbel noise is added to the logits, and the token with the highest sum is chosen. This token is a
sample from the softmax (Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030). The noise of a
row depends only on the row's seed. A row's response is therefore the same in any batch, with any
number of processes, and after any interruption.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, ProcessorMixin

from spavl_lib.data.collate import pad_rows, stack_vision
from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import encode_prompts, end_ids, until_end
from spavl_lib.generation.compact_decoding import can_decode, decode
from spavl_lib.modelling.roles import NEVER


@dataclass(frozen=True)
class Prompt:
    """The encoded prompt of one row: token ids without padding, and image tensors.

    `image_digest` is a digest of the image tensors. It is empty if the row has no image.
    `image_keys` has one digest for each image. It is empty if the tensors of several images cannot
    be told apart.
    """

    row_id: str
    text: str
    ids: list[int]
    token_types: dict[str, list[int]]
    vision: dict[str, Any]
    image_digest: str = ""
    image_keys: tuple[str, ...] = ()


@dataclass
class Rollout:
    """Prompts with sampled responses, and the columns that are computed for them.

    Columns are fp32 tensors (rows, width) on the CPU, except `scores` and `costs` (rows,). The
    places after the end of a response are padding, and hold 0.
    """

    prompts: list[Prompt]
    responses: list[list[int]]
    texts: list[str]
    finished: list[bool]
    columns: dict[str, Tensor] = field(default_factory=dict)
    mean_advantage: float = 0.0
    """Mean advantage over the response tokens, before whitening."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def width(self) -> int:
        """Number of tokens of the longest response."""
        return max(map(len, self.responses))

    @property
    def mask(self) -> Tensor:
        """Boolean (rows, width), True for tokens of the response, EOS included."""
        lengths = torch.tensor([len(r) for r in self.responses])
        return torch.arange(self.width)[None] < lengths[:, None]


def encode_rows(processor: ProcessorMixin, rows: list[dict]) -> list[Prompt]:
    """Encode each row's prompt separately, so that the token ids have no padding."""
    prompts = []
    for row, image in zip(rows, decode_images(rows), strict=True):
        encoded = encode_prompts(processor, [row["prompt"]], [image])
        types = {name: rows_of[0] for name, rows_of in encoded.token_types.items()}
        vision = encoded.vision
        digest, keys = digest_of_image(vision), image_keys(vision, len(image))
        prompts.append(
            Prompt(row["id"], row["prompt"], encoded.ids[0], types, vision, digest, keys)
        )
    return prompts


def digest_of_image(vision: dict[str, Tensor]) -> str:
    """Compute a hex digest of image tensors. The digest is empty if there are no tensors."""
    if not vision:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(vision):
        value = vision[name].contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy())
    return digest.hexdigest()


def image_keys(vision: dict[str, Tensor], count: int) -> tuple[str, ...]:
    """Compute a digest of each image's tensors. Equal images have equal digests in all rows.

    Args:
        vision: Image tensors of one row.
        count: Number of the row's images.

    Returns:
        The digests; none if a row of several images has tensors of another form than
        (images, channels, height, width), such as tiles padded to the largest image.
    """
    if count < 2:
        return (digest_of_image(vision),) * count
    pixels = vision.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or any(len(v) != count for v in vision.values()):
        return ()
    return tuple(
        digest_of_image({name: value[n : n + 1] for name, value in vision.items()})
        for n in range(count)
    )


def forbidden_token_ids(processor: ProcessorMixin) -> tuple[int, ...]:
    """Return the token ids that must not be sampled: image slots, BOS and padding.

    An id that ends a response is never among them.
    """
    tokenizer = processor.tokenizer
    ids = {tokenizer.bos_token_id, tokenizer.pad_token_id}
    # Processor and tokenizer can name different image tokens, because Gemma 3's processor replaces
    # one image token by another. Neither may be sampled.
    for owner in (processor, tokenizer):
        ids.add(getattr(owner, "image_token_id", None))
        if image := getattr(owner, "image_token", None):
            ids.add(tokenizer.convert_tokens_to_ids(image))
    return tuple(sorted(i for i in ids - {None, *end_ids(processor)}))


def batch_of(
    prompts: list[Prompt], responses: list[list[int]], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """Build a padded batch in which all responses begin in the same column.

    Prompts are padded on the left and responses on the right, to the longest of the batch:

        input_ids        pad pad P1 P2 | R1 R2 EOS pad
        attention_mask    0   0  1  1  | 1  1   1   0

    Let `width` be the length of the longest response. The last `width` columns hold the responses.
    The logits that predict them are one column to the left: `[:, -width - 1 : -1]`.

    Args:
        prompts: Encoded prompts of the rows.
        responses: Token ids of the responses. In a batch for generation all responses are empty.
        pad_id: Token id of padding.
        device: Device of the tensors.

    Returns:
        `input_ids` and `attention_mask` (rows, longest prompt + width), int64; token types of the
        same shape, for model families that use token types; and the image tensors, stacked over
        those rows that have an image.
    """
    width = max(map(len, responses))

    def joined(heads: list[list[int]], tails: list[list[int]], value: int) -> Tensor:
        left = pad_rows(heads, value, "left")
        return torch.cat([left, pad_rows(tails, value, "right")], 1) if width else left

    batch = {
        "input_ids": joined([p.ids for p in prompts], responses, pad_id),
        "attention_mask": joined(
            [[1] * len(p.ids) for p in prompts], [[1] * len(r) for r in responses], 0
        ),
    }
    for name in prompts[0].token_types:
        answers = [[0] * len(r) for r in responses]
        batch[name] = joined([p.token_types[name] for p in prompts], answers, 0)
    batch |= stack_vision([p.vision for p in prompts if p.vision])
    return {k: v.to(device) for k, v in batch.items()}


def seed_from(*parts: object) -> int:
    """Compute a seed from 0 to 2^63 - 1 that depends only on the parts."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class SeededSampling(LogitsProcessor):
    """A logits processor that turns greedy decoding into sampling. Each row has its own noise.

    Args:
        seeds: Seed of each row.
        temperature: Divisor of the logits.
        forbidden_ids: Token ids that are never sampled.
        device: Device of the logits.
    """

    def __init__(
        self, seeds: list[int], temperature: float, forbidden_ids: list[int], device: torch.device
    ):
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]
        self.temperature, self.forbidden_ids = temperature, forbidden_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add noise to logits (rows, vocabulary). transformers' `generate` calls this method."""
        return self.noisy(scores, range(len(scores)))

    def noisy(self, scores: Tensor, rows: Iterable[int]) -> Tensor:
        """Divide logits by the temperature and add Gumbel noise. The argmax is then a sample.

        Args:
            scores: Logits (rows, vocabulary).
            rows: For each row of `scores` the index of its seed.

        Returns:
            Logits with noise (rows, vocabulary), fp32.
        """
        scores = scores.float() / self.temperature
        scores[:, self.forbidden_ids] = NEVER
        exponential = torch.stack(
            [torch.empty_like(row).exponential_(generator=self.generators[i])
             for row, i in zip(scores, rows, strict=True)]
        )  # fmt: skip
        return scores - exponential.clamp_min(torch.finfo(scores.dtype).tiny).log()


@torch.no_grad()
def sample(
    model: nn.Module,
    batch: dict[str, Tensor],
    seeds: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    forbidden_ids: list[int],
    end_ids: Sequence[int],
    pad_id: int,
    compact: bool = True,
) -> list[list[int]]:
    """Sample a response to each prompt of a batch.

    Args:
        model: Policy, in evaluation mode.
        batch: Left-padded prompts (rows, seq).
        seeds: Seed of each row.
        max_new_tokens: Largest number of tokens in a response.
        temperature: Divisor of the logits.
        forbidden_ids: Token ids that are never sampled.
        end_ids: Token ids that end a response. The end id is part of the response.
        pad_id: Token id that fills up rows which ended early. It may be an end id.
        compact: Whether finished responses may leave the batch (`generation.compact_decoding`).

    Returns:
        New token ids of each row, cut after the first end id.
    """
    noise = SeededSampling(seeds, temperature, forbidden_ids, batch["input_ids"].device)
    if compact and can_decode(model):
        return decode(
            model, batch, lambda scores, rows: noise.noisy(scores, rows).argmax(-1),
            max_new_tokens=max_new_tokens, end_ids=end_ids,
        )  # fmt: skip
    out = model.generate(
        **batch,
        do_sample=False,
        logits_processor=LogitsProcessorList([noise]),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
    )[:, batch["input_ids"].shape[1] :]
    return [row[: len(until_end(row, end_ids)[0]) + 1] for row in out.tolist()]
