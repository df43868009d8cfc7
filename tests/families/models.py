"""Tiny random checkpoints of twelve families, written as they lie on the Hub.

No processor is made here: its files are written by hand, so that a test reads them as a user would.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.helpers import STOCK_LLAVA_TEMPLATE, byte_tokenizer

HIDDEN, SIDE, PATCH = 32, 32, 8
TEXT = dict(
    hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
)  # fmt: skip
TOWER = dict(
    hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    image_size=SIDE, patch_size=PATCH,
)  # fmt: skip
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
VISION = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
    "turn_token": "<|im_start|>",
}  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}SLOT"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"


def write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    processor: dict,
    images: dict,
    ends: list[int] | None = None,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: Takes the files.
        model: Its weights, made larger so that a wrong position or mask shows.
        tokenizer: Its tokenizer.
        template: Its chat template, empty for none.
        processor: `processor_config.json`.
        images: `preprocessor_config.json`.
        ends: End tokens of the generation config; None for the tokenizer's.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0 if "lm_head" not in name else 10.0)
            if name.endswith("mm_input_projection_weight"):  # zero in a new Gemma 3
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = ends or tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, page in (("processor_config", processor), ("preprocessor_config", images)):
        text = json.dumps(page | {"processor_class": processor["processor_class"]})
        (folder / f"{name}.json").write_text(text)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def ids_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """What a text config repeats of the tokenizer."""
    return {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip


def llava(folder: Path) -> Path:
    """LLaVA-1.5 as llava-hf converted it: it crops, and its template has neither BOS nor EOS."""
    words = byte_tokenizer(LLAMA, {"image_token": "<image>"})
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER),
        text_config=hf.LlamaConfig(**TEXT, **ids_of(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    return write(
        folder, hf.LlavaForConditionalGeneration(config), words, STOCK_LLAVA_TEMPLATE,
        {
            "processor_class": "LlavaProcessor", "patch_size": PATCH, "image_token": "<image>",
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        },
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE},
         "crop_size": SQUARE},
    )  # fmt: skip


def llava_next(folder: Path) -> Path:
    """LLaVA-NeXT: several tiles an image."""
    words = byte_tokenizer(LLAMA, {"image_token": "<image>"})
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER),
        text_config=hf.LlamaConfig(**TEXT, **ids_of(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return write(
        folder, hf.LlavaNextForConditionalGeneration(config), words, STOCK_LLAVA_TEMPLATE,
        {
            "processor_class": "LlavaNextProcessor", "patch_size": PATCH, "image_token": "<image>",
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        },
        {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": SIDE},
         "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
    )  # fmt: skip


def llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: its template writes a space before answers alone."""
    words = byte_tokenizer(
        QWEN, {"image_token": "<image>", "video_token": "<video>", "turn_token": "<|im_start|>"}
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT, **ids_of(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"), image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return write(
        folder, hf.LlavaOnevisionForConditionalGeneration(config), words, template,
        {
            "processor_class": "LlavaOnevisionProcessor", "image_token": "<image>",
            "video_token": "<video>", "num_image_tokens": 16, "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_select_strategy": "full",
        },
        {"image_processor_type": "LlavaOnevisionImageProcessor", "size": SQUARE,
         "image_grid_pinpoints": PINPOINTS},
    )  # fmt: skip


PIXTRAL_TOWER = dict(
    hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    image_size=64, patch_size=PATCH, head_dim=16,
)  # fmt: skip
PIXTRAL_TOKENS = {
    "image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]",
    "inst": "[INST]", "inst_end": "[/INST]",
}  # fmt: skip
PIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST]"
    "{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)


def pixtral(folder: Path) -> Path:
    """Pixtral in LLaVA's class: images of any shape, padded in a batch."""
    words = byte_tokenizer(LLAMA, PIXTRAL_TOKENS)
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**PIXTRAL_TOWER),
        text_config=hf.MistralConfig(**TEXT, **ids_of(words), head_dim=8, sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return write(
        folder, hf.LlavaForConditionalGeneration(config), words, PIXTRAL_TEMPLATE,
        {"processor_class": "PixtralProcessor", "patch_size": PATCH},
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 64},
         "patch_size": {"height": PATCH, "width": PATCH}},
    )  # fmt: skip


def mistral3(folder: Path) -> Path:
    """Mistral 3: Pixtral's tower, four patches a token."""
    words = byte_tokenizer(LLAMA, PIXTRAL_TOKENS)
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**PIXTRAL_TOWER),
        text_config=hf.MistralConfig(**TEXT, **ids_of(words), head_dim=8, sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1,
        spatial_merge_size=2,
    )  # fmt: skip
    return write(
        folder, hf.Mistral3ForConditionalGeneration(config), words, PIXTRAL_TEMPLATE,
        {"processor_class": "PixtralProcessor", "patch_size": PATCH, "spatial_merge_size": 2},
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 64},
         "patch_size": {"height": PATCH, "width": PATCH}},
    )  # fmt: skip


def _qwen(folder: Path, name: str, config: dict, vision: dict, text: dict | None = None) -> Path:
    """A Qwen-VL.

    Args:
        folder: Takes the files.
        name: Class names begin with it.
        config: Further settings.
        vision: The tower's settings.
        text: Further settings of the language model.
    """
    words = byte_tokenizer(QWEN, VISION)
    named = {
        key: words.convert_tokens_to_ids(token)
        for key, token in (
            ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }  # fmt: skip
    made = getattr(hf, f"{name}Config")(
        text_config={**TEXT, **ids_of(words), "rope_parameters": ROPE} | (text or {}),
        vision_config=vision, tie_word_embeddings=False, **named, **config,
    )  # fmt: skip
    model = getattr(hf, f"{name}ForConditionalGeneration")(made)
    patch = vision.get("patch_size", 14)
    return write(
        folder, model, words, CHATML.replace("SLOT", QWEN_SLOT),
        {"processor_class": f"{name}Processor"},
        {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch, "merge_size": 2,
         "temporal_patch_size": 2,
         "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}},
        ends=[words.eos_token_id, words.pad_token_id],
    )  # fmt: skip


def qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL: positions in three axes, flat patches."""
    vision = dict(
        depth=2, embed_dim=32, hidden_size=HIDDEN, num_heads=4, mlp_ratio=2, patch_size=14
    )
    return _qwen(folder, "Qwen2VL", {}, vision)


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: its tower attends within windows."""
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=HIDDEN,
        window_size=56, fullatt_block_indexes=[1], patch_size=14,
    )  # fmt: skip
    return _qwen(folder, "Qwen2_5_VL", {}, vision)


def qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL: features of several layers of the tower."""
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=HIDDEN,
        patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    text = {"rope_parameters": ROPE | {"mrope_interleaved": True}, "head_dim": 8}
    return _qwen(folder, "Qwen3VL", {}, vision, text)


def internvl(folder: Path) -> Path:
    """InternVL: tiles beside each other, not one axis deeper."""
    extra = {
        "image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
        "video_token": "<video>", "context_image_token": "<IMG_CONTEXT>",
        "turn_token": "<|im_start|>",
    }  # fmt: skip
    words = byte_tokenizer(QWEN, extra)
    vision = hf.InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH],
    )  # fmt: skip
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT, **ids_of(words)), vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), downsample_ratio=0.5,
    )  # fmt: skip
    return write(
        folder, hf.InternVLForConditionalGeneration(config), words,
        CHATML.replace("SLOT", "<IMG_CONTEXT>\n"),
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        {"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, "crop_to_patches": True,
         "min_patches": 1, "max_patches": 4},
    )  # fmt: skip


def idefics3(folder: Path) -> Path:
    """Idefics3, SmolVLM's family: an image is split, each piece in its own markers."""
    rows = {f"row{r}{c}": f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)}
    words = byte_tokenizer(
        {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"},
        {
            "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", **rows,
        },
    )  # fmt: skip
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT, **ids_of(words)),
        vision_config={
            k: v for k, v in TOWER.items() if k != "projection_dim"
        },
        image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    template = (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    return write(
        folder, hf.Idefics3ForConditionalGeneration(config), words, template,
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
        {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 2 * SIDE},
         "max_image_size": {"longest_edge": SIDE}},
    )  # fmt: skip


def gemma3(folder: Path) -> Path:
    """Gemma 3: an image's tokens see each other, and a turn ends with a token of its own."""
    words = byte_tokenizer(
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
        {
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>", "turn": "<start_of_turn>", "turn_end": "<end_of_turn>",
        },
    )  # fmt: skip
    named = words.convert_tokens_to_ids
    layers = ["sliding_attention", "full_attention"]
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            **TEXT, **ids_of(words), head_dim=8, sliding_window=64, layer_types=layers
        ),
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        mm_tokens_per_image=4, image_token_index=named("<image_soft_token>"),
        boi_token_index=named("<start_of_image>"), eoi_token_index=named("<end_of_image>"),
    )  # fmt: skip
    template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
        "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    return write(
        folder, hf.Gemma3ForConditionalGeneration(config), words, template,
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE},
        ends=[words.eos_token_id, named("<end_of_turn>")],
    )  # fmt: skip


def paligemma(folder: Path) -> Path:
    """PaliGemma: its prompt sees itself in both directions, and no template comes with it."""
    words = byte_tokenizer(
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
        {"image_token": "<image>"},
    )
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT, **ids_of(words), head_dim=8),
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        image_token_index=words.convert_tokens_to_ids("<image>"), projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )  # fmt: skip
    return write(
        folder, hf.PaliGemmaForConditionalGeneration(config), words, "",
        {"processor_class": "PaliGemmaProcessor"},
        {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "image_seq_length": 16},
    )  # fmt: skip


def mllama(folder: Path) -> Path:
    """Llama 3.2 Vision: images by cross attention."""
    words = byte_tokenizer(
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
         "pad_token": "<|finetune_right_pad_id|>"},
        {"image_token": "<|image|>", "python": "<|python_tag|>", "head": "<|start_header_id|>",
         "head_end": "<|end_header_id|>"},
    )  # fmt: skip
    text = TEXT | ids_of(words) | {
        "num_hidden_layers": 2, "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1,
        attention_heads=4, image_size=SIDE, patch_size=PATCH, max_num_tiles=2,
        intermediate_layers_indices=[0, 1], vision_output_dim=96,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    config = hf.MllamaConfig(
        text_config=text, vision_config=vision,
        image_token_index=words.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip
    template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}"
    )
    return write(
        folder, hf.MllamaForConditionalGeneration(config), words, template,
        {"processor_class": "MllamaProcessor"},
        {"image_processor_type": "MllamaImageProcessor", "size": SQUARE, "max_image_tiles": 2},
    )  # fmt: skip


BUILDERS: dict[str, Callable[[Path], Path]] = {
    build.__name__: build
    for build in (
        llava, llava_next, llava_onevision, pixtral, mistral3, qwen2_vl, qwen2_5_vl, qwen3_vl,
        internvl, idefics3, gemma3, paligemma, mllama,
    )
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Write the checkpoint of a family into a new folder."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    return BUILDERS[name](folder)
