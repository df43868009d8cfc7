"""Rewrite checkpoints of the LLaVA authors' code (`llava_llama`) so that transformers reads them.

    spavl model import SRC DST [--tower CLIP]

The weights that the SPA-VL authors released are in that layout, which this module calls "the
original layout". The result has the layout of `llava-hf/llava-1.5-7b-hf`. Memory holds one shard at
a time.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spavl_lib.data.templates import VICUNA_V1
from spavl_lib.errors import InputError
from spavl_lib.modelling.families import llava_images
from spavl_lib.runs.files import read_json, write_json, writing

NAMES = (
    (re.compile(r"^model\.vision_tower\.vision_tower\."), "vision_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(embed_tokens|layers|norm)\."), r"language_model.model.\1."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
)
# Which part of the tower's output is used: the original code's name -> transformers' name.
STRATEGIES = {"patch": "default", "cls_patch": "full"}
# A model computes these buffers when it is created, so they are not written.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|position_ids)$")
VOCABULARY_MULTIPLE = 64  # embedding rows are padded to a multiple of this, as on the Hub
# Settings of the original code that change the model's input. The table holds for each setting the
# value that counts if config.json does not hold the setting, and the values that can be imported.
TAKEN: dict[str, tuple[Any, tuple]] = {
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "image_aspect_ratio": ("square", ("pad", "square", None)),  # anyres is LLaVA-NeXT
    "mm_vision_select_feature": ("patch", tuple(STRATEGIES)),
    "mm_use_im_start_end": (False, (False, None)),  # True: trained tokens enclose the image
}
# Sizes of openai/clip-vit-large-patch14-336. LLaVA-1.5's config.json names this tower only.
CLIP_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


def new_name(name: str) -> str | None:
    """A tensor's name in transformers' layout; None for a buffer.

    Raises:
        InputError: The original layout has no such tensor.
    """
    if BUFFERS.search(name):
        return None
    for pattern, replacement in NAMES:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    raise InputError(f"{name!r} is no tensor of an original LLaVA-1.5 checkpoint")


def import_llava(source: Path, target: Path, tower: Path | None = None) -> dict[str, Any]:
    """Rewrite a checkpoint from the original layout into transformers' layout.

    Args:
        source: Folder with config.json (`llava_llama`), safetensors and tokenizer.
        target: A new or empty folder. `AutoModelForImageTextToText` can load the result from it.
        tower: Folder of the CLIP tower, needed if the checkpoint does not hold the tower.

    Returns:
        Number of tensors, and number of values by part.

    Raises:
        InputError: The source is not in the original layout, a tensor is missing, doubled or
            damaged, or the target is not empty.
    """
    original = _read_config(source)
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; choose a new folder")
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{source} holds no .safetensors files; pickles are not read")
    tokenizer, image_token = _tokenizer(source)
    # In some checkpoints the embedding already has more rows than the tokenizer has tokens.
    words = max(len(tokenizer), original["vocab_size"])
    rows = -(-words // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    target.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    counts: dict[str, int] = {}
    total = 0
    with writing(target):
        for number, (path, rename) in enumerate(_sources(shards, tower)):
            named = _renamed(path, rename, written, rows, original["vocab_size"])
            name = f"model-{number + 1:05d}.safetensors"
            save_file(named, target / name, metadata={"format": "pt"})
            written |= dict.fromkeys(named, name)
            for key, value in named.items():
                part = key.split(".")[0]
                counts[part] = counts.get(part, 0) + value.numel()
                total += value.numel() * value.element_size()
        write_json(
            target / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(written.items()))},
        )
        config = _new_config(original, tower, tokenizer, image_token, rows)
        config.save_pretrained(target)
        _processor(config, tokenizer, original).save_pretrained(target)
    _check_names(config, written, source)
    return {"tensors": len(written), "values": counts}


def _read_config(source: Path) -> dict:
    try:
        config = read_json(source / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{source} has no readable config.json: {error}") from error
    kind = config.get("model_type")
    if kind not in ("llava_llama", "llava") or "mm_hidden_size" not in config:
        raise InputError(
            f"{source} is no checkpoint of the original LLaVA code: model_type {kind!r}, expected "
            "'llava_llama' with mm_hidden_size"
        )
    problems = [
        f"{key} {config.get(key, missing)!r} (only {', '.join(map(repr, taken))})"
        for key, (missing, taken) in TAKEN.items()
        if config.get(key, missing) not in taken
    ]
    if problems:
        raise InputError(f"{source} cannot be imported, because of {'; '.join(problems)}")
    return config


def _sources(shards: list[Path], tower: Path | None) -> list[tuple[Path, Any]]:
    sources: list[tuple[Path, Any]] = [(path, new_name) for path in shards]
    if tower is not None:
        files = sorted(tower.glob("*.safetensors"))
        if not files:
            raise InputError(f"{tower} holds no .safetensors files of a CLIP tower")
        sources += [(path, _tower_name) for path in files]
    return sources


def _tower_name(name: str) -> str | None:
    """A CLIP tensor's name in transformers' LLaVA; None for CLIP's text model and for buffers."""
    keep = name.startswith("vision_model.") and not BUFFERS.search(name)
    return f"vision_tower.{name}" if keep else None


def _renamed(
    path: Path, rename: Any, before: dict[str, str], rows: int, vocabulary: int
) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                new = rename(name)
                if new is None:
                    continue
                if new in named or new in before:
                    raise InputError(f"{path}: the checkpoint holds {name} twice")
                named[new] = handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in named:
            named[name] = _with_rows(named[name], rows, vocabulary, path)
    return named


def _with_rows(weight: Tensor, rows: int, vocabulary: int, path: Path) -> Tensor:
    """Extend an embedding or head to `rows` rows, among them rows for image and padding token.

    Each new row is the mean of the first `vocabulary` rows. Rows of `weight` after these are
    replaced.

    Args:
        weight: Embedding or head (vocabulary or more, hidden).
        rows: Rows of the result.
        vocabulary: Rows of `weight` that belong to tokens.
        path: The file, for the error message.
    """
    if weight.shape[0] < vocabulary:
        raise InputError(
            f"{path}: {weight.shape[0]} rows of the vocabulary, but config.json says {vocabulary}"
        )
    words = weight[:vocabulary]
    mean = words.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([words, mean.expand(rows - vocabulary, -1)]).contiguous()


def _tokenizer(source: Path) -> tuple[Any, int]:
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{source}: cannot read the tokenizer: {error} (if it is a tokenizer.model, run "
            "`pip install sentencepiece protobuf`)"
        ) from error
    tokenizer.add_special_tokens(
        {
            "pad_token": AddedToken("<pad>", special=True, normalized=False),
            "additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)],
        }
    )
    return tokenizer, tokenizer.convert_tokens_to_ids("<image>")


def _new_config(
    original: dict, tower: Path | None, tokenizer: Any, image_token: int, rows: int
) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = dict(CLIP_336)
    described = (tower / "config.json") if tower else None
    if described and described.is_file():
        page = read_json(described)
        vision = {**page.get("vision_config", page)}
        vision.pop("model_type", None)
    elif "vision_config" in original:
        vision = original["vision_config"]
    known = set(LlamaConfig().to_dict()) - {"architectures", "model_type", "dtype", "torch_dtype"}
    # transformers reads these two settings, and writes `rope_parameters` instead of them.
    known |= {"rope_theta", "rope_scaling"}
    text = {k: v for k, v in original.items() if k in known}
    text |= {
        "vocab_size": rows,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_id=image_token,
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=STRATEGIES[_feature(original)],
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2
        + (_feature(original) == "cls_patch"),
        architectures=["LlavaForConditionalGeneration"],
    )


def _feature(original: dict) -> str:
    return original.get("mm_vision_select_feature", TAKEN["mm_vision_select_feature"][0])


def _processor(config: Any, tokenizer: Any, original: dict) -> Any:
    from transformers import LlavaProcessor

    vision = config.vision_config
    padded = original.get("image_aspect_ratio") == "pad"
    return LlavaProcessor(
        image_processor=llava_images(vision.image_size, pad=padded),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=VICUNA_V1,
    )


def _check_names(config: Any, written: dict[str, str], source: Path) -> None:
    """Check that the written tensors are exactly the model's parameters.

    Raises:
        InputError: Tensors are missing or unexpected; the message names the first of them.
    """
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    expected = {hub_name(name) for name, _ in model.named_parameters()}
    missing = sorted(expected - written.keys())
    extra = sorted(written.keys() - expected)
    if missing or extra:
        tower = " (if the tower lies in another folder, name it with --tower)" if any(
            name.startswith("vision_tower") for name in missing
        ) else ""  # fmt: skip
        raise InputError(
            f"{source}: {len(missing)} tensors missing {missing[:3]}, {len(extra)} unexpected "
            f"{extra[:3]}{tower}"
        )


def hub_name(name: str) -> str:
    """The name in the Hub's LLaVA-1.5 files of a parameter with this name in memory."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name
