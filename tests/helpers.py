"""What several test modules share: small configs, data folders, models of other families."""

import copy
import functools
import hashlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from peft import get_peft_model
from PIL import Image as Pictures
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from spavl_lib.config import Config, DataConfig, load_config
from spavl_lib.data.embedded.mini_files import mini_folder
from spavl_lib.data.load import load_preferences
from spavl_lib.data.sampling import spread as spread  # other tests import it from here
from spavl_lib.errors import InputError
from spavl_lib.modelling import canary
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.heads import ScalarHeadModel, save_reward_model
from spavl_lib.modelling.load import load_model, load_processor
from spavl_lib.runs.files import read_json, read_jsonl, write_json
from spavl_lib.runs.stage import Stage

# A root of runs into which next to nothing is written.
UNUSED = Path(tempfile.gettempdir()) / "spavl-unused"
MINI = DataConfig(source="mini", train_rows=0, validation_rows=0, test_rows=0)
# Of llava-hf/llava-1.5-7b-hf: neither BOS nor EOS is in it.
STOCK_LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% endif %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Algorithms without reinforcement learning: the trainer of each, and what is set for it.
SUPERVISED = {
    "reward": ("reward", {"model.adapter": "lora"}),
    "dpo_lora": ("dpo", {"model.adapter": "lora"}),
    "dpo_full": ("dpo", {"model.adapter": "full"}),
}


def smoke(overrides: dict | None = None, **options: object) -> Config:
    """The smoke profile with changes."""
    return load_config("smoke", overrides, **options)


@functools.cache
def embedded_processor() -> ProcessorMixin:
    """The embedded model's processor; not to be changed."""
    return load_processor(smoke().model)


@functools.cache
def _embedded_model() -> PreTrainedModel:
    return load_model(smoke({"model.adapter": "full"}).model)


def embedded_model(*, own: bool = False) -> PreTrainedModel:
    """The embedded base model; a copy if the test changes it."""
    return copy.deepcopy(_embedded_model()) if own else _embedded_model()


@functools.cache
def mini_rows(split: str = "train") -> Dataset:
    """All preference rows of SPA-VL mini."""
    return load_preferences(MINI, split)


def png(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (24, 16)) -> bytes:
    """A one-colour picture's file."""
    buffer = io.BytesIO()
    Pictures.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


# --- data folders -------------------------------------------------------------------------------


def write_parquet(path: Path, rows: Iterable[dict]) -> Path:
    """Rows in the Hub's columns; `image` cells are bytes or None."""
    rows = list(rows)
    table = {key: [row.get(key) for row in rows] for key in rows[0]}
    table["image"] = [
        None if cell is None else cell if isinstance(cell, dict) else {"bytes": cell, "path": None}
        for cell in table["image"]
    ]
    kinds = {key: Image(decode=False) if key == "image" else Value("string") for key in table}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `to_parquet`, which would put a path's bytes into the file.
    rows = Dataset.from_dict(table, features=Features(kinds))
    parquet.write_table(rows.data.table, path)
    return path


def hub_rows(split: str, count: int) -> list[dict]:
    """Some rows of mini as they stand in its parquet files."""
    pattern = {"train": "data/train-*", "validation": "validation/validation-*"}[split]
    (path,) = mini_folder().glob(pattern)
    raw = Dataset.from_parquet(str(path)).cast_column("image", Image(decode=False))
    return spread(raw, count)


def write_hub_folder(folder: Path, train: list[dict], validation: list[dict] | None = None) -> Path:
    """A data set in the Hub's layout, without meta files."""
    write_parquet(folder / "data/train-00000-of-00001.parquet", train)
    if validation:
        write_parquet(folder / "validation/validation-00000-of-00001.parquet", validation)
    return folder


def original_record(number: int = 0, **changes: object) -> dict:
    """A record of the original's layout."""
    record = {
        "id": number,
        "image": f"Malicious Use/Illegal activities/theft/{number}.png",
        "question": f"Question {number}?",
        "chosen": f"A careful answer {number}.",
        "rejected": f"A reckless answer {number}.",
    } | changes
    return {k: v for k, v in record.items() if v is not ...}


def write_original_folder(folder: Path, lists: dict[str, list], *, images: bool = True) -> Path:
    """Lists by keyword in the original's layout, and a picture for every relative image path."""
    folder.mkdir(parents=True, exist_ok=True)
    for keyword, records in lists.items():
        (folder / f"{keyword}.json").write_text(json.dumps(records), encoding="utf-8")
        for n, record in enumerate(records if images else ()):
            name = record.get("image") if isinstance(record, dict) else None
            if isinstance(name, str) and name and not name.startswith(("/", "..")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(png((n % 256, 10, 10)))
    keyword_map = json.dumps({k: f"{k}.json" for k in lists})
    for name in ("config_train.json", "config_test.json"):
        (folder / name).write_text(keyword_map, encoding="utf-8")
    return folder


def original_config(folder: Path, **changes: object) -> DataConfig:
    """How a folder of `write_original_folder` is read."""
    values = {"train_rows": 0, "validation_rows": 0, "test_rows": 0} | changes
    return DataConfig(source="original", path=str(folder), **values)


def hub_config(folder: Path, **changes: object) -> DataConfig:
    """How a folder of `write_hub_folder` is read."""
    values = {"train_rows": 0, "validation_rows": 0, "test_rows": 0} | changes
    return DataConfig(source="hub_layout", path=str(folder), **values)


def files_of(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# --- models of other families, random and tiny, made offline ------------------------------------


def byte_tokenizer(special: dict[str, str], extra: dict[str, str]) -> PreTrainedTokenizerFast:
    """One token a byte, and the given special tokens after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = dict.fromkeys([*special.values(), *extra.values()])
    raw.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, **special, extra_special_tokens=extra, padding_side="left"
    )


TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
)  # fmt: skip
TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    image_size=32, patch_size=8,
)  # fmt: skip
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.5: CLIP, two-layer projector, Llama; the stock template, crop and patch settings."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = byte_tokenizer(LLAMA_TOKENS, {"image_token": "<image>"})
    side = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=STOCK_LLAVA_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, **_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return _random(LlavaForConditionalGeneration, config), processor


def tiny_llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-NeXT: several tiles an image, so the number of image tokens follows its shape."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer = byte_tokenizer(LLAMA_TOKENS, {"image_token": "<image>"})
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    side = {"height": 32, "width": 32}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=STOCK_LLAVA_TEMPLATE,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, **_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    return _random(LlavaNextForConditionalGeneration, config), processor


def tiny_qwen() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2.5-VL: no BOS, multimodal rotary positions, flat patches with a grid."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = byte_tokenizer(
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
            "turn_token": "<|im_start|>",
        },
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as the real one
    slot = "<|vision_start|><|image_pad|><|vision_end|>"
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}

    class WithoutVideos(Qwen2_5_VLProcessor):
        """The stock one checks the class of its video processor, which needs torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            return type(argument)

    processor = WithoutVideos(
        image_processor=Qwen2VLImageProcessorPil(size=pixels),
        tokenizer=tokenizer,
        video_processor=SimpleNamespace(model_input_names=[]),
        chat_template=CHATML_TEMPLATE.replace("IMAGE", slot),
    )
    named = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT, **_ids(tokenizer), "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
            "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1],
        },
        image_token_id=named("<|image_pad|>"),
        video_token_id=named("<|video_pad|>"),
        vision_start_token_id=named("<|vision_start|>"),
        vision_end_token_id=named("<|vision_end|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    return _random(Qwen2_5_VLForConditionalGeneration, config), processor


def tiny_idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Idefics3, SmolVLM's family: an image is split, each piece in its own markers."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    tokenizer = byte_tokenizer(
        {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"},
        {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
    )
    edge = {"longest_edge": 32}
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size=edge),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=(
            "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
            "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
            "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
        ),
    )
    config = Idefics3Config(
        text_config={"model_type": "llama", **TEXT, **_ids(tokenizer)},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return _random(Idefics3ForConditionalGeneration, config), processor


FAMILIES = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "qwen2_5_vl": tiny_qwen,
    "idefics3": tiny_idefics3,
}


@functools.cache
def tiny(family: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model of a family, or `embedded`, with its processor; not to be changed."""
    if family == "embedded":
        return embedded_model(), embedded_processor()
    return FAMILIES[family]()


def _random(cls: type, config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():  # large enough that a wrong position or mask shows in the numbers
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0 if "lm_head" not in name else 10.0)
    return model


def shake(module: nn.Module, seed: int) -> None:
    """Change adapters and heads at random: LoRA's second factor starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or "score" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def write_reward_model(folder: Path, adapter: str, *, with_cost: bool = False) -> None:
    """Save a reward model on the embedded base that was never trained: what it adds is random."""
    config = smoke({"model.adapter": adapter}).model
    vlm = embedded_model(own=True)
    if adapter == "lora":
        vlm = get_peft_model(vlm, lora_config(vlm, config))
    torch.manual_seed(3)
    model = ScalarHeadModel(vlm, with_cost=with_cost)
    shake(model, 1)
    save_reward_model(model, folder, config)


# --- numbers ------------------------------------------------------------------------------------


@torch.no_grad()
def logps_of(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Summed completion log-probability of every row of a collated batch."""
    from spavl_lib.objectives.logps import sequence_logps

    inputs = {
        k: v.to(model.dtype) if torch.is_floating_point(v) else v
        for k, v in batch.items()
        if k not in ("completion_mask", "row_ids")
    }
    logits = model(**inputs).logits
    return sequence_logps(logits, batch["input_ids"], batch["completion_mask"].bool())


def problems_of(error: InputError) -> list[str]:
    """The lines of an error that lists several problems."""
    return [line.strip() for line in str(error).splitlines()[1:]]


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[int]:
    """A list that grows by one at every call of `owner.name`, which still does its work."""
    calls: list[int] = []
    inner = getattr(owner, name)

    def counted(*args: object, **options: object) -> object:
        calls.append(1)
        return inner(*args, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def canary_in_this_process(folder: Path, rows: list[dict], expected: list[dict]) -> list[dict]:
    """What `canary` does in a new process, which takes longer to start than to answer."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "asked.json", Path(scratch) / "answered.json"
        write_json(asked, canary.to_json(rows, expected))
        canary.main(folder, asked, answered)
        return read_json(answered)


def metric_rows(stage: Stage) -> list[dict]:
    """metrics.jsonl without the fields that depend on the machine."""
    rows, machines = read_jsonl(stage.metrics_path), ("time_s", "peak_memory_gib")
    return [{k: v for k, v in row.items() if k not in machines} for row in rows]


def load_script(name: str) -> ModuleType:
    """A file of `scripts/` as a module."""
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
