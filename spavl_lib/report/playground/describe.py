"""What the page must know of a model and its processor, and which models it can compute."""

import json
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedConfig, ProcessorMixin
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from spavl_lib.data.embedded import language
from spavl_lib.data.embedded.mini import mini_rows
from spavl_lib.data.templates import (
    completion_ids,
    conversation,
    encode_prompts,
    neutralise,
    render,
    special_tokens,
)
from spavl_lib.errors import InputError

LARGEST = 20_000_000  # parameters; the page holds two bytes for each, and computes them in script
ACTIVATIONS = ("gelu", "quick_gelu", "silu")  # those of model.js
_QUESTION = "What is this?"
# Texts whose prompts and answers the page must write as the processor does.
_TRIALS = (_QUESTION, "  Two  words\n", "a <image> and </s>?", "ÄÖ 12,5 'it's", "", "😀")


def check_model(config: PreTrainedConfig) -> None:
    """Check that the page can compute a model.

    Args:
        config: The model's config.

    Raises:
        InputError: It cannot. The message says why.
    """
    if reason := _obstacle(config):
        raise InputError(
            "the playground computes in the browser only models that are built as the embedded "
            "one (LLaVA with a CLIP tower and a Llama decoder, fewer than 20 million parameters), "
            f"and {reason}"
        )


def _obstacle(config: PreTrainedConfig) -> str:
    """Why the page cannot compute a model; empty if it can."""
    kinds = [
        getattr(part, "model_type", None)
        for part in (config, getattr(config, "vision_config", None), config.get_text_config())
    ]
    if kinds != ["llava", "clip_vision_model", "llama"]:
        return f"this model is built of {', '.join(str(kind) for kind in kinds if kind)}"
    with torch.device("meta"):  # counts without memory
        model = AutoModelForImageTextToText.from_config(config)
    if (count := sum(p.numel() for p in model.parameters())) >= LARGEST:
        return f"this model has {count / 1e6:,.0f} million"
    text, vision = config.text_config, config.vision_config
    settings = {
        "vision_feature_layer": isinstance(config.vision_feature_layer, int),
        "projector_hidden_act": config.projector_hidden_act in ACTIVATIONS,
        "vision_config.hidden_act": vision.hidden_act in ACTIVATIONS,
        "text_config.hidden_act": text.hidden_act == "silu",
        "text_config.attention_bias": not text.attention_bias,
        "text_config.mlp_bias": not text.mlp_bias,
        "text_config.rope_parameters": text.rope_parameters.get("rope_type") == "default",
    }
    unknown = [name for name, known in settings.items() if not known]
    return f"this model differs in {', '.join(unknown)}" if unknown else ""


def vision(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of the tower."""
    tower, layer = config.vision_config, config.vision_feature_layer
    return {
        "size": tower.image_size,
        "patch": tower.patch_size,
        "width": tower.hidden_size,
        "inner": tower.intermediate_size,
        "heads": tower.num_attention_heads,
        # Hidden state 0 is the embeddings, so the number of a state is the number of layers.
        "layers": layer if layer >= 0 else tower.num_hidden_layers + 1 + layer,
        "activation": tower.hidden_act,
        "epsilon": tower.layer_norm_eps,
        "withClass": config.vision_feature_select_strategy != "default",
    }


def text(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of projector and decoder."""
    decoder = config.text_config
    return {
        "width": decoder.hidden_size,
        "inner": decoder.intermediate_size,
        "heads": decoder.num_attention_heads,
        "kvHeads": decoder.num_key_value_heads,
        "size": decoder.head_dim,
        "layers": decoder.num_hidden_layers,
        "epsilon": decoder.rms_norm_eps,
        "theta": decoder.rope_parameters["rope_theta"],
        "context": decoder.max_position_embeddings,
        "projectorActivation": config.projector_hidden_act,
        "projectorBias": config.multimodal_projector_bias,
    }


def image(processor: ProcessorMixin, side: int) -> dict[str, Any]:
    """The settings of the image processor.

    Args:
        processor: The model's processor.
        side: Width and height of the tower's input, in pixels.

    Raises:
        InputError: The processor does not pad images to a square and resize them to `side`.
    """
    images = processor.image_processor
    steps = ("do_pad", "do_resize", "do_rescale", "do_normalize", "do_center_crop")
    if (
        not isinstance(images, LlavaImageProcessorPil)
        or [bool(getattr(images, step)) for step in steps] != [True] * 4 + [False]
        or (images.size.get("height"), images.size.get("width")) != (side, side)
        or images.resample != 3  # bicubic
    ):
        raise InputError(
            "the playground prepares images only as LLaVA-1.5 does (padded to a square, then "
            "resized), and this run's processor does something else, as with model.image_aspect"
        )
    return {
        "size": side,
        "factor": images.rescale_factor,
        "mean": list(images.image_mean),
        "std": list(images.image_std),
        "background": [int(value * 255) for value in images.image_mean],
    }


def tokenizer(processor: ProcessorMixin) -> dict[str, Any]:
    """The tokenizer's vocabulary, merges and control tokens.

    Raises:
        InputError: The tokenizer is not a plain byte-level BPE.
    """
    page = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    model, splitter = page["model"], page["pre_tokenizer"] or {}
    plain = (
        (model["type"], splitter.get("type"), page["normalizer"]) == ("BPE", "ByteLevel", None)
        and splitter["use_regex"]
        and not splitter["add_prefix_space"]
        and not any(model.get(key) for key in ("dropout", "byte_fallback", "ignore_merges"))
        and not any(token[key] for token in page["added_tokens"] for key in ("lstrip", "rstrip"))
    )
    if not plain:
        raise InputError(
            "the playground reads only byte-level BPE tokenizers such as GPT-2's, and this model "
            "has another tokenizer"
        )
    vocabulary = model["vocab"] | {token["content"]: token["id"] for token in page["added_tokens"]}
    tokens = [""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"tokens": tokens, "merges": merges, "special": special_tokens(processor)}


def chat(processor: ProcessorMixin, ends: tuple[int, ...]) -> dict[str, Any]:
    """What stands around a question and before an answer, and the ids of control tokens.

    Args:
        processor: The model's processor.
        ends: Ids that end an answer, as `end_ids` gives them.

    Raises:
        InputError: The chat template does more than put text around the question and the answer.
    """
    prefix, _, suffix = render(processor, _QUESTION).rstrip(" ").partition(_QUESTION)
    before, whole = conversation(processor, _QUESTION, "Yes.")
    lead = whole[len(before) :].partition("Yes.")[0]
    for trial in _TRIALS:
        written = render(processor, trial).rstrip(" ")
        answered = conversation(processor, trial, trial.strip())[1]
        safe = neutralise(trial, processor)
        if written != prefix + safe + suffix or not answered.startswith(
            prefix + safe + suffix + lead + neutralise(trial.strip(), processor)
        ):
            raise InputError(
                f"the playground cannot write this model's prompts: its chat template changes the "
                f"question {trial!r}"
            )
    slot = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    side = processor.image_processor.size["height"]
    [ids] = encode_prompts(processor, [_QUESTION], [Image.new("RGB", (side, side))]).ids
    return {
        "prefix": prefix,
        "suffix": suffix,
        "lead": lead,
        "image": slot,
        "slots": ids.count(slot),
        "bos": processor.tokenizer.bos_token_id,
        "ends": list(ends),
    }


def refusal_openings(processor: ProcessorMixin) -> dict[str, Any] | None:
    """The beginnings of the embedded world's refusals that no other answer there has.

    Returns:
        `words`: the first words of refusals, such as "Sorry"; and `ids`: the token ids of each
        word. None if a tokenizer gives a refusal and another answer the same beginning.
    """
    words: dict[bool, set[str]] = {True: set(), False: set()}
    for split in ("train", "validation"):
        for row in mini_rows()[split]:
            for answer in (row.chosen, row.rejected):
                refuses = language.verdict(answer) == "refused"
                words[refuses].add(answer.split()[0].rstrip(",.!"))
    ids = {
        word: completion_ids(processor, _QUESTION, word)[:-1]
        for word in sorted(words[True] | words[False])
    }
    for word in words[True]:
        if any(ids[other][: len(ids[word])] == ids[word] for other in ids.keys() - {word}):
            return None
    refusing = sorted(words[True])
    return {"words": refusing, "ids": [ids[word] for word in refusing]}
