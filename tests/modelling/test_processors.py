"""Processors as they lie in folders: what they leave out, and what makes them useless."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoProcessor, ProcessorMixin

from spavl_lib.config import ModelConfig
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.errors import InputError
from spavl_lib.modelling import processors
from spavl_lib.modelling.load import load_model, load_processor
from spavl_lib.modelling.processors import NoVideos, describe, read_processor
from tests.families.models import build
from tests.helpers import CHATML_TEMPLATE, mini_rows, smoke, spread


def folder_of(tmp_path: Path, family: str = "llava", **pages: dict | None) -> Path:
    """A tiny checkpoint with changed JSON files; None as a value removes a key.

    Args:
        tmp_path: Takes it.
        family: Its family.
        pages: Name of a file, and what changes in it.
    """
    folder = build(family, tmp_path / family)
    for name, changes in pages.items():
        path = folder / f"{name}.json"
        page = json.loads(path.read_text()) if path.is_file() else {}
        page = {k: v for k, v in (page | (changes or {})).items() if v is not None}
        path.write_text(json.dumps(page))
    return folder


def loaded(folder: Path) -> ProcessorMixin:
    return load_processor(ModelConfig(name=str(folder), adapter="full"))


OLD = {"patch_size": None, "vision_feature_select_strategy": None,
       "num_additional_image_tokens": None}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "missing"),
    [
        *[("llava", {name: None}) for name in OLD],
        *[("llava_next", {name: None}) for name in OLD],
        ("llava", OLD),
        ("llava_next", OLD),
    ],
)
def test_sizes_that_old_files_leave_out_are_read_from_the_model(
    family: str, missing: dict, tmp_path: Path
) -> None:
    whole = loaded(folder_of(tmp_path / "whole", family))
    old = loaded(folder_of(tmp_path / "old", family, processor_config=missing))
    assert [getattr(old, name) for name in OLD] == [getattr(whole, name) for name in OLD]
    rows = spread(mini_rows(), 1)
    batches = [PreferenceCollator(p)(rows)["input_ids"].tolist() for p in (whole, old)]
    assert batches[0] == batches[1]


def test_without_a_padding_token_the_end_token_pads_and_that_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "qwen2_5_vl", tokenizer_config={"pad_token": None})
    with pytest.warns(UserWarning, match="no padding token; its end token '<|im_end|>' is used"):
        processor = loaded(folder)
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id
    rows = spread(mini_rows(), 2)
    batch = PreferenceCollator(processor)(rows)
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1  # some rows are padded, and each is scored to its end
    for ids, mask, length in zip(
        batch["input_ids"], batch["completion_mask"], lengths, strict=True
    ):
        scored = ids[mask.bool()].tolist()
        assert scored.count(processor.tokenizer.eos_token_id) == 1
        assert mask[int(length) - 1] == 1 and mask[int(length) :].sum() == 0


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def text_only(folder: Path) -> None:
    """A language model's template, which prints a list of parts as Python does."""
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def without_slot(folder: Path) -> None:
    template = CHATML_TEMPLATE.replace("IMAGE", "")
    (folder / "chat_template.jinja").write_text(template)


def broken(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}")


def raising(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only text') }}")


def no_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)


def foreign(folder: Path) -> None:
    """Weights of a smaller vocabulary."""
    path = folder / "config.json"
    page = json.loads(path.read_text())
    page["text_config"]["vocab_size"] = 200
    path.write_text(json.dumps(page))


def edit(path: Path, **changes: object) -> None:
    page = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in page.items() if v is not None}))


USELESS = {
    no_template: "has no chat template; write the one that it was trained with",
    text_only: "chat template writes no '<|image_pad|>'",
    without_slot: "chat template writes no '<|image_pad|>'",
    broken: "its chat template fails",
    raising: "its chat template fails: only text",
    no_end: "names no end token; set eos_token",
    foreign: "vocabulary has 200 rows, none for",
}


@pytest.mark.parametrize("harm", USELESS)
def test_what_cannot_be_used_is_said_in_a_sentence(harm: Callable, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "qwen2_5_vl")
    harm(folder)
    with pytest.raises(InputError, match="cannot load a processor for model") as caught:
        loaded(folder)
    assert USELESS[harm] in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_a_template_in_the_tokenizers_file_is_the_checkpoints_own(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "qwen2_5_vl")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=template)
    assert loaded(folder).chat_template == template


def test_a_llava_without_a_template_gets_vicunas_and_that_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.warns(UserWarning, match="chat template is missing; LLaVA-1.5's own"):
        assert "curious user" in loaded(folder).chat_template


def test_a_llava_of_another_vocabulary_without_a_template_is_refused(tmp_path: Path) -> None:
    """Llama 3 in LLaVA's class: Vicuna's turns are not what it was trained on."""
    folder = folder_of(tmp_path)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<s>", "<|begin|>").replace("</s>", "<|end|>")
        (folder / name).write_text(text)
    with pytest.raises(InputError, match="has no chat template"):
        loaded(folder)


def test_settings_of_videos_are_saved_as_they_were(tmp_path: Path) -> None:
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2.5}
    folder = folder_of(tmp_path, "qwen2_5_vl", video_preprocessor_config=videos)
    processor = loaded(folder)
    assert isinstance(processor.video_processor, NoVideos)
    processor.save_pretrained(tmp_path / "saved")
    page = json.loads((tmp_path / "saved/processor_config.json").read_text())
    assert page["video_processor"] == videos
    again = read_processor(str(tmp_path / "saved"), None, "qwen2_5_vl")
    assert again.video_processor == videos
    assert describe(again) == describe(processor)


def test_the_manifest_names_the_class_that_made_the_pixels(tmp_path: Path) -> None:
    said = describe(loaded(folder_of(tmp_path, "gemma3")))
    assert said["image_processor"] == "Gemma3ImageProcessorPil"
    assert said["class"] == "Gemma3Processor" and len(said["chat_template_sha256"]) == 64


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, "idefics3")

    def needs(*_: object, **__: object) -> None:
        raise ImportError("\nSmolVLMProcessor requires num2words\nand more")

    monkeypatch.setattr(processors.AutoTokenizer, "from_pretrained", needs)
    with pytest.raises(InputError, match="needs a package: SmolVLMProcessor requires num2words$"):
        loaded(folder)


@pytest.mark.skipif("torchvision" in sys.modules, reason="the two processors then differ")
def test_the_embedded_processor_is_the_one_that_transformers_reads() -> None:
    path = load_processor(smoke().model).tokenizer.name_or_path
    ours, theirs = read_processor(path, None, "llava"), AutoProcessor.from_pretrained(path)
    assert ours.to_dict() == theirs.to_dict() and type(ours) is type(theirs)
    assert ours.chat_template == theirs.chat_template
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


@pytest.mark.parametrize("family", ["paligemma", "mllama"])
def test_a_refused_family_is_refused_at_every_door(family: str, tmp_path: Path) -> None:
    config = ModelConfig(name=str(folder_of(tmp_path, family)), adapter="full")
    for door in (load_processor, load_model):
        with (
            warnings.catch_warnings(),
            pytest.raises(InputError, match=f"model '.*{family}' cannot be used"),
        ):
            warnings.simplefilter("error")
            door(config)
