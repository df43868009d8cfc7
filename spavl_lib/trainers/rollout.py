"""A rollout: answers sampled from the policy, row by row reproducible, as tensors of one width.

Sampling is greedy decoding over logits with Gumbel noise, which is sampling from the softmax; the
noise of a row depends on nothing but its seed, so a row's answer is the same in any batch, on any
number of processes, and after any interruption.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, ProcessorMixin

from spavl_lib.data.collate import pad_rows, stack_vision
from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import encode_prompts
from spavl_lib.generation.compact_decoding import can_decode, decode
from spavl_lib.modelling.roles import NEVER


@dataclass(frozen=True)
class Prompt:
    """One row's prompt, encoded alone: ids without padding, and its image tensors.

    `image_digest` is a digest of the image tensors, empty without an image.
    """

    row_id: str
    text: str
    ids: list[int]
    token_types: list[int] | None
    vision: dict[str, Any]
    image_digest: str = ""


@dataclass
class Rollout:
    """Prompts with sampled answers, and what was computed of them.

    Tensors are (rows, width) on the CPU, 0 where `mask` is False: a position past the answer's end.
    """

    prompts: list[Prompt]
    responses: list[list[int]]
    texts: list[str]
    finished: list[bool]
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def width(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.responses))

    @property
    def mask(self) -> Tensor:
        """True = a token of the answer, its EOS included (rows, width)."""
        lengths = torch.tensor([len(r) for r in self.responses])
        return torch.arange(self.width)[None] < lengths[:, None]


def encode_rows(processor: ProcessorMixin, rows: list[dict]) -> list[Prompt]:
    """Each row's prompt, encoded by itself."""
    prompts = []
    for row, image in zip(rows, decode_images(rows), strict=True):
        encoded = encode_prompts(processor, [row["prompt"]], [image])
        types = encoded.token_types[0] if encoded.token_types else None
        vision = encoded.vision
        digest = digest_of_image(vision)
        prompts.append(Prompt(row["id"], row["prompt"], encoded.ids[0], types, vision, digest))
    return prompts


def digest_of_image(vision: dict[str, Tensor]) -> str:
    """Equal for equal image tensors alone; empty for none."""
    if not vision:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(vision):
        value = vision[name].contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy())
    return digest.hexdigest()


def forbidden_token_ids(processor: ProcessorMixin) -> tuple[int, ...]:
    """Ids that would break a sequence: image slots, BOS, padding (if it is not EOS)."""
    tokenizer = processor.tokenizer
    ids = {tokenizer.bos_token_id, tokenizer.pad_token_id}
    ids.add(getattr(processor, "image_token_id", None))
    image = getattr(processor, "image_token", None)
    if image:
        ids.add(tokenizer.convert_tokens_to_ids(image))
    return tuple(sorted(i for i in ids - {None, tokenizer.eos_token_id}))


def batch_of(
    prompts: list[Prompt], responses: list[list[int]], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """One padded batch: prompts end, and answers begin, in the same column of every row.

    Args:
        prompts: Padded on the left.
        responses: Padded on the right; may be empty lists, for generation.
        pad_id: What padding holds; the mask says where it is.
        device: Where the tensors go.
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
    if prompts[0].token_types is not None:
        types = [[0] * len(r) for r in responses]
        batch["mm_token_type_ids"] = joined([p.token_types for p in prompts], types, 0)
    batch |= stack_vision([p.vision for p in prompts if p.vision])
    return {k: v.to(device) for k, v in batch.items()}


def seed_from(*parts: object) -> int:
    """A seed that depends on all its parts and nothing else."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling, with noise of each row's own.

    Args:
        seeds: One a row.
        temperature: Divides the logits.
        forbidden_ids: Never said.
        device: Where the logits will be.
    """

    def __init__(
        self, seeds: list[int], temperature: float, forbidden_ids: list[int], device: torch.device
    ):
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]
        self.temperature, self.forbidden_ids = temperature, forbidden_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What `generate` asks of a logits processor."""
        return self.noisy(scores, range(len(scores)))

    def noisy(self, scores: Tensor, rows: Iterable[int]) -> Tensor:
        """Logits over temperature, plus Gumbel noise: their argmax is a sample.

        Args:
            scores: Logits (rows, vocabulary).
            rows: Whose they are, as numbers of seeds.
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
    eos_id: int,
    pad_id: int,
    compact: bool = True,
) -> list[list[int]]:
    """The answers' ids: exactly the new tokens, cut after the first EOS.

    Args:
        model: In evaluation mode.
        batch: Left-padded prompts.
        seeds: One a row.
        max_new_tokens: Longest answer.
        temperature: Divides the logits.
        forbidden_ids: Never said.
        eos_id: Ends an answer, and belongs to it.
        pad_id: Fills rows that ended early; may be the same as EOS.
        compact: Whether answers that have ended may leave the batch (`modelling.decoding`).
    """
    noise = SeededSampling(seeds, temperature, forbidden_ids, batch["input_ids"].device)
    if compact and can_decode(model):
        return decode(
            model, batch, lambda scores, rows: noise.noisy(scores, rows).argmax(-1),
            max_new_tokens=max_new_tokens, eos_id=eos_id,
        )  # fmt: skip
    out = model.generate(
        **batch,
        do_sample=False,
        logits_processor=LogitsProcessorList([noise]),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )[:, batch["input_ids"].shape[1] :]
    answers = []
    for row in out.tolist():
        answers.append(row[: row.index(eos_id) + 1] if eos_id in row else row)
    return answers
