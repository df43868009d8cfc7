"""Tiny random models of every family whose prefixes are shared, and of two that are refused.

Their images and token ids are made by hand: no processor is needed to compare a model with itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn
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


def tiled(model: PreTrainedModel) -> Tiny:
    """A model that cuts images into tiles; a batch has as many tiles for each image."""
    tiny = Tiny(model, lambda i: {
        "pixel_values": noise(i, 1, 5, 3, 28, 28), "image_sizes": torch.tensor([TILED[i]]),
    }, lambda i: [])  # fmt: skip
    counts = [
        len(model.model.get_image_features(**tiny.image(i)).pooler_output[0]) for i in (0, 1, 2)
    ]
    tiny.tokens = lambda i: [IMAGE] * counts[i]
    return tiny


def llava_next() -> Tiny:
    """LLaVA-NeXT."""
    config = hf.LlavaNextConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS, pad_token_id=PAD,
    )  # fmt: skip
    return tiled(hf.LlavaNextForConditionalGeneration(config))


def llava_onevision() -> Tiny:
    """LLaVA-OneVision."""
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=hf.Qwen2Config(**TEXT), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS, pad_token_id=PAD,
    )  # fmt: skip
    return tiled(hf.LlavaOnevisionForConditionalGeneration(config))


def any_shape(model: type, config: type, patches: int, **options: object) -> Tiny:
    """A model with Pixtral's tower, which takes images of any shape, padded in a batch.

    Args:
        model: The model's class.
        config: Its config's class.
        patches: Number of patches that become a token.
        **options: Further settings.
    """
    tower = hf.PixtralVisionConfig(**TOWER, image_size=32, patch_size=4, head_dim=16)
    text = hf.MistralConfig(**TEXT, sliding_window=None, head_dim=16)
    sizes = ((32, 32), (32, 16), (16, 32))

    def image(number: int) -> dict[str, Tensor]:
        height, width = sizes[number]
        padding = (0, 32 - width, 0, 32 - height)
        pixels = nn.functional.pad(noise(number, 1, 3, height, width), padding)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([sizes[number]])}

    made = config(
        vision_config=tower, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1,
        pad_token_id=PAD, **options,
    )  # fmt: skip
    tokens = [height * width // 16 // patches for height, width in sizes]
    return Tiny(model(made), image, lambda i: [IMAGE] * tokens[i])


def pixtral() -> Tiny:
    """Pixtral, in LLaVA's class."""
    return any_shape(
        hf.LlavaForConditionalGeneration, hf.LlavaConfig, 1, vision_feature_select_strategy="full"
    )


def mistral3() -> Tiny:
    """Mistral 3."""
    return any_shape(
        hf.Mistral3ForConditionalGeneration, hf.Mistral3Config, 4, spatial_merge_size=2
    )


def patched(model: PreTrainedModel) -> Tiny:
    """A model that takes the patches of all images in one tensor, and positions of three axes."""
    return Tiny(
        model,
        lambda i: {
            "pixel_values": noise(i, GRIDS[i][1] * GRIDS[i][2], 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([GRIDS[i]]),
        },
        lambda i: [START, *[IMAGE] * (GRIDS[i][1] * GRIDS[i][2] // 4), END],
        "mm_token_type_ids",
    )


def qwen2_vl() -> Tiny:
    """Qwen2-VL."""
    tower = dict(
        depth=3, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": ROPE}, vision_config=tower, **QWEN_IDS
    )
    return patched(hf.Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl(**text: object) -> Tiny:
    """Qwen2.5-VL: its tower attends within windows.

    Args:
        **text: Further settings of the text model.
    """
    config = hf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": ROPE} | text,
        vision_config=QWEN_TOWER | dict(window_size=16, fullatt_block_indexes=[2]), **QWEN_IDS,
    )  # fmt: skip
    return patched(hf.Qwen2_5_VLForConditionalGeneration(config))


def qwen2_5_vl_sliding() -> Tiny:
    """Qwen2.5-VL whose later layers have a window."""
    return qwen2_5_vl(use_sliding_window=True, sliding_window=14, max_window_layers=1)


def qwen3_vl() -> Tiny:
    """Qwen3-VL: features of several layers of the tower go into several layers of the text."""
    tower = QWEN_TOWER | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    config = hf.Qwen3VLConfig(text_config=TEXT | INTERLEAVED, vision_config=tower, **QWEN_IDS)
    return patched(hf.Qwen3VLForConditionalGeneration(config))


def qwen3_vl_moe() -> Tiny:
    """Qwen3-VL with experts."""
    tower = QWEN_TOWER | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    config = hf.Qwen3VLMoeConfig(
        text_config=TEXT | INTERLEAVED | experts, vision_config=tower, **QWEN_IDS
    )
    return patched(hf.Qwen3VLMoeForConditionalGeneration(config))


def qwen3_5() -> Tiny:
    """Qwen3.5: most layers are recurrent. It is refused."""
    rope = INTERLEAVED["rope_parameters"] | {"partial_rotary_factor": 1.0}
    config = hf.Qwen3_5Config(
        text_config=TEXT | {"rope_parameters": rope, "head_dim": 16, "num_hidden_layers": 4},
        vision_config=QWEN_TOWER | dict(num_position_embeddings=64), **QWEN_IDS,
    )  # fmt: skip
    return patched(hf.Qwen3_5ForConditionalGeneration(config))


def glm(name: str) -> Tiny:
    """A model of the GLM-4V family.

    Args:
        name: Its classes' names begin with it.
    """
    rope = ROPE | {"partial_rotary_factor": 1.0}
    tower = hf.Glm4vVisionConfig(**QWEN_TOWER | dict(depth=2, image_size=32))
    text = hf.Glm4vTextConfig(**TEXT, rope_parameters=rope)
    config = getattr(hf, f"{name}Config")(
        text_config=text, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO,
        image_start_token_id=START, image_end_token_id=END, video_start_token_id=7,
        video_end_token_id=8,
    )  # fmt: skip
    return patched(getattr(hf, f"{name}ForConditionalGeneration")(config))


def glm4v() -> Tiny:
    """GLM-4.1V."""
    return glm("Glm4v")


def glm46v() -> Tiny:
    """GLM-4.6V."""
    return glm("Glm46V")


def deepseek_vl() -> Tiny:
    """DeepSeek-VL."""
    config = hf.DeepseekVLConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=siglip(), image_token_id=IMAGE
    )
    return square(hf.DeepseekVLForConditionalGeneration(config), [IMAGE] * 16)


def internvl() -> Tiny:
    """InternVL: two tiles an image, along the first axis."""
    tower = hf.InternVLVisionConfig(**TOWER, image_size=[32, 32], patch_size=[4, 4])
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT), vision_config=tower, image_token_id=IMAGE,
        downsample_ratio=0.5,
    )  # fmt: skip
    model = hf.InternVLForConditionalGeneration(config)
    return Tiny(model, lambda i: {"pixel_values": noise(i, 2, 3, 32, 32)}, lambda i: [IMAGE] * 32)


def split(model: PreTrainedModel, tokens: int) -> Tiny:
    """A model that takes (rows, images, ...), with two pieces of each image.

    Args:
        model: The model.
        tokens: Number of tokens of a piece.
    """
    piece = [START, *[IMAGE] * tokens]
    return Tiny(
        model,
        lambda i: {
            "pixel_values": noise(i, 1, 2, 3, 32, 32),
            "pixel_attention_mask": torch.ones(1, 2, 32, 32, dtype=torch.long),
        },
        lambda i: [*piece, *piece, END],
    )


def idefics2() -> Tiny:
    """Idefics2: a resampler between tower and text model."""
    resampler = dict(
        resampler_n_latents=8, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=16,
        num_key_value_heads=1, hidden_size=64,
    )  # fmt: skip
    config = hf.Idefics2Config(
        text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        vision_config=hf.Idefics2VisionConfig(**TOWER, image_size=32, patch_size=4),
        perceiver_config=resampler, image_token_id=IMAGE,
    )  # fmt: skip
    return split(hf.Idefics2ForConditionalGeneration(config), 8)


def idefics3() -> Tiny:
    """Idefics3."""
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.Idefics3VisionConfig(**TOWER, image_size=32, patch_size=4),
        image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return split(hf.Idefics3ForConditionalGeneration(config), 16)


def smolvlm() -> Tiny:
    """SmolVLM."""
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.SmolVLMVisionConfig(**TOWER, image_size=32, patch_size=4),
        image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return split(hf.SmolVLMForConditionalGeneration(config), 16)


def gemma4(bidirectional: str | None = "vision", shared_layers: int = 2) -> Tiny:
    """Gemma 4: embeddings for each layer, and layers that use earlier layers' keys.

    Args:
        bidirectional: Which tokens see each other, as the config names them; None for no tokens.
        shared_layers: Number of layers that use earlier layers' keys.
    """
    text = TEXT | dict(
        head_dim=16, global_head_dim=16, num_hidden_layers=6, sliding_window=12,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
        layer_types=MIXED * 3, use_bidirectional_attention=bidirectional,
        num_kv_shared_layers=shared_layers,
    )  # fmt: skip
    tower = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, patch_size=4, pooling_kernel_size=2,
        position_embedding_size=64,
    )  # fmt: skip
    config = hf.Gemma4Config(
        text_config=text, vision_config=tower, audio_config=None, image_token_id=IMAGE,
        boi_token_id=START, eoi_token_id=END, video_token_id=VIDEO, audio_token_id=9,
        pad_token_id=PAD,
    )  # fmt: skip
    side = torch.arange(8)
    places = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(1, 64, 2)
    return Tiny(
        hf.Gemma4ForConditionalGeneration(config),
        lambda i: {
            "pixel_values": noise(i, 1, 64, 48).sigmoid(), "image_position_ids": places.clone()
        },
        lambda i: [START, *[IMAGE] * 16, END], "mm_token_type_ids",
    )  # fmt: skip


def gemma4_causal() -> Tiny:
    """Gemma 4 with neither."""
    return gemma4(None, 0)


def mllama() -> Tiny:
    """Llama 3.2 Vision: images by cross attention. It is refused."""
    text = TEXT | dict(
        num_hidden_layers=4, cross_attention_layers=[1, 3],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    tower = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1,
        attention_heads=2, image_size=28, patch_size=7, max_num_tiles=2,
        intermediate_layers_indices=[0, 1], vision_output_dim=96,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    config = hf.MllamaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE)
    return square(hf.MllamaForConditionalGeneration(config), [IMAGE])


BUILDERS: dict[str, Callable[[], Tiny]] = {
    build.__name__: build
    for build in (
        llava, llava_sliding, llava_next, llava_onevision, pixtral, mistral3, vipllava, aya_vision,
        cohere2_vision, qwen2_vl, qwen2_5_vl, qwen2_5_vl_sliding, qwen3_vl, qwen3_vl_moe, glm4v,
        glm46v, deepseek_vl, internvl, idefics2, idefics3, smolvlm, gemma3, paligemma, paligemma2,
        gemma4, gemma4_causal, qwen3_5, mllama,
    )
}  # fmt: skip
REFUSED = ("qwen3_5", "mllama")
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
