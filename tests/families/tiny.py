"""Tiny random models of every family whose prefixes are shared, and of two that are refused.

Their images and token ids are made by hand: no processor is needed to compare a model with itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 160
PAD, BOS, EOS, IMAGE, START, END, VIDEO = 0, 1, 2, 3, 4, 5, 6
WORDS = 10  # the first id that is a word
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=96, max_position_embeddings=512,
    tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
)  # fmt: skip
TOWER = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
QWEN_TOWER = dict(
    depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4,
    spatial_merge_size=2, temporal_patch_size=2,
)  # fmt: skip
QWEN_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
    vision_end_token_id=END,
)  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
INTERLEAVED = {"rope_parameters": ROPE | {"mrope_interleaved": True}, "head_dim": 16}
MIXED = ["sliding_attention", "full_attention"]
WINDOW = dict(sliding_window=12, num_hidden_layers=4)  # shorter than every row
GRIDS = ((1, 8, 8), (1, 4, 8), (1, 8, 12))  # patches of images 0, 1 and 2
TILED = ((28, 50), (50, 28), (40, 44))  # heights and widths of images 0, 1 and 2
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


@dataclass
class Tiny:
    """A model with what it needs of an image."""

    model: PreTrainedModel
    image: Callable[[int], dict[str, Tensor]]
    """The tensors of image 0, 1 or 2."""
    tokens: Callable[[int], list[int]]
    """The token ids that stand for an image."""
    types: str = ""
    """Name of the argument that marks image tokens; `prefix` if it marks responses."""


def noise(seed: int, *shape: int) -> Tensor:
    """Random pixels (*shape)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed))


def words(seed: int, count: int) -> list[int]:
    """Random token ids of words."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS, VOCABULARY, (count,), generator=chance).tolist()


def clip() -> hf.CLIPVisionConfig:
    """A tower with 16 patches."""
    return hf.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7)


def siglip() -> hf.SiglipVisionConfig:
    """A tower with 16 patches."""
    return hf.SiglipVisionConfig(**TOWER, image_size=28, patch_size=7, vision_use_head=False)


def square(model: PreTrainedModel, tokens: list[int], types: str = "") -> Tiny:
    """A model whose images are all 28 x 28 pixels.

    Args:
        model: The model.
        tokens: The token ids of an image.
        types: See `Tiny.types`.
    """
    return Tiny(model, lambda i: {"pixel_values": noise(i, 1, 3, 28, 28)}, lambda i: tokens, types)


def llava(text: hf.PreTrainedConfig | None = None) -> Tiny:
    """LLaVA-1.5.

    Args:
        text: Config of the text model; None for a Llama.
    """
    config = hf.LlavaConfig(
        vision_config=clip(), text_config=text or hf.LlamaConfig(**TEXT), image_token_index=IMAGE,
        image_seq_length=16, pad_token_id=PAD,
    )  # fmt: skip
    return square(hf.LlavaForConditionalGeneration(config), [IMAGE] * 16)


def llava_sliding() -> Tiny:
    """LLaVA with Mistral's sliding window."""
    return llava(hf.MistralConfig(**TEXT, sliding_window=12))


def vipllava() -> Tiny:
    """VipLLaVA: features of two layers of the tower."""
    config = hf.VipLlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE,
        vision_feature_layers=[-2, -1], pad_token_id=PAD,
    )  # fmt: skip
    return square(hf.VipLlavaForConditionalGeneration(config), [IMAGE] * 16)


def aya_vision() -> Tiny:
    """Aya Vision: sliding and full layers take turns."""
    config = hf.AyaVisionConfig(
        vision_config=siglip(), text_config=hf.Cohere2Config(**TEXT | WINDOW),
        image_token_index=IMAGE, downsample_factor=2, alignment_intermediate_size=64,
    )  # fmt: skip
    return square(hf.AyaVisionForConditionalGeneration(config), [IMAGE] * 4)


def cohere2_vision() -> Tiny:
    """Cohere 2 Vision."""
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(), text_config=hf.Cohere2Config(**TEXT | WINDOW),
        image_token_id=IMAGE, downsample_factor=2, alignment_intermediate_size=64,
    )  # fmt: skip
    return square(hf.Cohere2VisionForConditionalGeneration(config), [IMAGE] * 4)


def gemma3() -> Tiny:
    """Gemma 3: an image's tokens see each other, and layers take turns."""
    text = hf.Gemma3TextConfig(**TEXT | WINDOW, head_dim=16, layer_types=MIXED * 2)
    config = hf.Gemma3Config(
        text_config=text, vision_config=siglip(), image_token_id=IMAGE, mm_tokens_per_image=4,
        boi_token_index=START, eoi_token_index=END, pad_token_id=PAD,
    )  # fmt: skip
    model = hf.Gemma3ForConditionalGeneration(config)
    # Zero in a new model, which would hide the images.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return square(model, [START, *[IMAGE] * 4, END], "token_type_ids")


def paligemma(text: hf.PreTrainedConfig | None = None) -> Tiny:
    """PaliGemma: the prompt sees itself in both directions.

    Args:
        text: Config of the text model; None for a Gemma.
    """
    config = hf.PaliGemmaConfig(
        text_config=text or hf.GemmaConfig(**TEXT, head_dim=16), vision_config=siglip(),
        image_token_index=IMAGE, projection_dim=64, hidden_size=64, pad_token_id=PAD,
    )  # fmt: skip
    return square(hf.PaliGemmaForConditionalGeneration(config), [IMAGE] * 16, "prefix")


def paligemma2() -> Tiny:
    """PaliGemma 2: scores are capped, and layers take turns."""
    text = TEXT | WINDOW | dict(attn_logit_softcapping=20.0, query_pre_attn_scalar=16)
    return paligemma(hf.Gemma2Config(**text, head_dim=16))


BUILDERS: dict[str, Callable[[], Tiny]] = {
    build.__name__: build
    for build in (
        llava, llava_sliding, vipllava, aya_vision, cohere2_vision, gemma3, paligemma, paligemma2,
    )
}  # fmt: skip
# Capped scores exist in eager attention only.
EAGER_TEXT = ("paligemma2",)


def build(name: str, attention: str = "sdpa") -> Tiny:
    """A tiny model in fp32.

    Args:
        name: Key of `BUILDERS`.
        attention: sdpa or eager.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        tiny = BUILDERS[name]()
        chance = torch.Generator().manual_seed(3)
        for key, parameter in tiny.model.named_parameters():
            if parameter.ndim == 1:  # norms and biases, which start at 1 and 0
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=chance))
            elif "embed_tokens" in key or "lm_head" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=chance))
    kernels: str | dict = attention
    if name in EAGER_TEXT and attention == "sdpa":
        kernels = {"text_config": "eager", "vision_config": "sdpa"}
    tiny.model.set_attn_implementation(kernels)
    return tiny


def batch_of(
    tiny: Tiny, rows: Sequence[tuple[int, list[int], list[int]]], side: str
) -> tuple[dict[str, Tensor], Tensor]:
    """A collated batch.

    Args:
        tiny: The model.
        rows: For each row the number of its image, its question and its response.
        side: Side of the padding, left or right.

    Returns:
        The arguments of the model, and a mask (rows, length) of the responses, int64.
    """
    prompts = [[BOS, *tiny.tokens(image), *question] for image, question, _ in rows]
    whole = [torch.tensor(p + response) for p, (*_, response) in zip(prompts, rows, strict=True)]
    width = max(map(len, whole))
    ids = torch.full((len(rows), width), PAD)
    mask, responses = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (row, prompt) in enumerate(zip(whole, prompts, strict=True)):
        first = 0 if side == "right" else width - len(row)
        ids[i, first : first + len(row)], mask[i, first : first + len(row)] = row, 1
        responses[i, first + len(prompt) : first + len(row)] = 1
    images = [tiny.image(image) for image, *_ in rows]
    batch = {key: torch.cat([image[key] for image in images]) for key in images[0]}
    if tiny.types:
        name = "token_type_ids" if tiny.types == "prefix" else tiny.types
        batch[name] = responses if tiny.types == "prefix" else (ids == IMAGE).long()
    return batch | {"input_ids": ids, "attention_mask": mask}, responses
