"""Ask an exported model a few training prompts in a new process, and compare with the trained one.

An export can lose what was trained without an error: an adapter that is not found, a projector that
stays the base's, tensors under other names, another chat template. The model then answers like its
base. `check` loads the export as other programs do, with transformers alone, and raises an error if
the answers are not those of the trained model.
"""

import base64
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

import spavl_lib
from spavl_lib.config import DataConfig, ModelConfig
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.images import decode_images, png_bytes
from spavl_lib.data.load import load_preferences
from spavl_lib.data.sampling import spread
from spavl_lib.data.templates import end_ids
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import architecture, compute_dtype, device, quiet_libraries, rounding
from spavl_lib.modelling.processors import complete, read_processor
from spavl_lib.runs.files import read_json, write_json

PROMPTS = 8
MAX_NEW_TOKENS = 32


def prompts(config: DataConfig) -> list[dict]:
    """A few training rows, evenly over the training set: `id`, `prompt` and `image` of each.

    Of a row with several images, the first one is asked about.

    Raises:
        InputError: The data set cannot be read.
    """
    rows = spread(load_preferences(config, "train"), PROMPTS)
    images = decode_images(rows)
    return [
        {"id": row["id"], "prompt": row["prompt"], "image": png_bytes(image[0]) if image else None}
        for row, image in zip(rows, images, strict=True)
    ]


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: list[dict],
    expected: list[dict] | None = None,
) -> list[dict[str, Any]]:
    """Answer each prompt greedily, one prompt at a time.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        rows: Rows of `prompts`.
        expected: The result of this function for another model. None for the first model.

    Returns:
        For each row `prompt_ids`; `ids`, the answer's token ids with its end token; `logps`, the
        log-probability of each token in nats; and `gap`: at the first token that differs from the
        expected answer, by how many nats this model prefers its own token. `gap` is 0 if there is
        no such token.
    """
    collate, ends = PromptCollator(processor), list(end_ids(processor, model))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    results = []
    for number, row in enumerate(rows):
        image = row["image"] and {"bytes": row["image"], "path": None}
        batch = {k: v.to(model.device) for k, v in collate([row | {"image": image}]).items()}
        length = batch["input_ids"].shape[1]
        room = min(MAX_NEW_TOKENS, max(1, context - length)) if context else MAX_NEW_TOKENS
        output = model.generate(
            **batch, do_sample=False, max_new_tokens=room, eos_token_id=ends,
            pad_token_id=processor.tokenizer.pad_token_id, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        ids = output.sequences[0, length:].tolist()
        logps = torch.stack(output.logits)[:, 0].float().log_softmax(-1)
        gap = 0.0
        if expected is not None:
            other = expected[number]["ids"]
            place = _common(ids, other)
            if place < min(len(ids), len(other)):
                gap = (logps[place, ids[place]] - logps[place, other[place]]).item()
        results.append(
            {
                "prompt_ids": batch["input_ids"][0].tolist(),
                "ids": ids,
                "logps": [logps[i, token].item() for i, token in enumerate(ids)],
                "gap": gap,
            }
        )
    return results


def _common(a: list[int], b: list[int]) -> int:
    """The number of tokens that two answers have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def unlike(one: dict, other: dict, tolerance: float) -> str:
    """In what two models' answers to one prompt differ; empty if they are equal up to rounding.

    Args:
        one: The expected entry of `answers`.
        other: The entry that is compared with it, with `gap`.
        tolerance: Difference of log-probabilities in nats that rounding may cause. An answer may
            also go on with another token if the model prefers it by no more than this.
    """
    if one["prompt_ids"] != other["prompt_ids"]:
        return "the prompt has other token ids, so its chat template or tokenizer differs"
    shared = _common(one["ids"], other["ids"])
    pairs = zip(one["logps"][:shared], other["logps"][:shared], strict=True)
    distance = max((abs(a - b) for a, b in pairs), default=0.0)
    if distance > tolerance:
        return f"the log-probability of a token differs by {distance:.2g} nats"
    longest = max(len(one["ids"]), len(other["ids"]))
    if shared < longest and (
        other["gap"] > tolerance or shared == min(len(one["ids"]), len(other["ids"]))
    ):
        return "the answer has other words"
    return ""


def check(
    folder: Path, processor: ProcessorMixin, rows: list[dict], trained: list[dict],
    base: list[dict],
) -> dict[str, Any]:  # fmt: skip
    """Load an export in a new process, and compare its answers with the trained model's.

    Args:
        folder: A model, or a folder with `base/` and `adapter/`.
        processor: The processor of the trained model, for the text of a message.
        rows: The prompts.
        trained: `answers` of the trained model.
        base: `answers` of its base model, with the trained model's as the expected ones.

    Returns:
        The number of prompts, and to how many of them the base model answers otherwise.

    Raises:
        InputError: The export cannot be loaded, an answer of the export is not the trained model's,
            or the trained model is its base to the last bit.
    """
    tolerance = 10 * rounding()  # merged weights are rounded, and so are the products with them
    others = sum(bool(unlike(t, b, tolerance)) for t, b in zip(trained, base, strict=True))
    if all(t["ids"] == b["ids"] and t["logps"] == b["logps"]
           for t, b in zip(trained, base, strict=True)):  # fmt: skip
        raise InputError(
            f"the trained model answers {len(rows)} training prompts exactly like its base model, "
            "to the last bit of each probability; its weights are lost, or it was not trained"
        )
    if not others:
        warnings.warn(
            f"the trained model answers {len(rows)} training prompts like its base model, up to "
            "rounding; was its learning rate too low?",
            stacklevel=2,
        )
    exported = _in_new_process(folder, rows, trained)
    found = {
        row["id"]: (what, t, e, e["ids"] == b["ids"])
        for row, t, e, b in zip(rows, trained, exported, base, strict=True)
        if (what := unlike(t, e, tolerance))
    }
    if found:
        name, (what, t, e, _) = next(iter(found.items()))
        like_base = sum(same for *_, same in found.values())
        decode = processor.tokenizer.decode
        raise InputError(
            f"the export in {folder} is not the trained model: it answers {len(found)} of "
            f"{len(rows)} training prompts otherwise, {like_base} of them like the base model. "
            f"Row {name}: {what}; the trained model answers {decode(t['ids'])!r}, the export "
            f"{decode(e['ids'])!r}"
        )
    return {"prompts": len(rows), "unlike_base": others}


def _in_new_process(folder: Path, rows: list[dict], expected: list[dict]) -> list[dict]:
    """`answers` of an export, from a new process.

    Raises:
        InputError: The process failed; the message has the last line of its error.
    """
    with tempfile.TemporaryDirectory(prefix="spavl-canary-") as scratch:
        asked, answered = Path(scratch) / "asked.json", Path(scratch) / "answered.json"
        write_json(asked, to_json(rows, expected))
        package = str(Path(spavl_lib.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(folder.absolute()), str(asked), str(answered)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise InputError(f"the export in {folder} does not load in a new process: {last}")
        return read_json(answered)


def to_json(rows: list[dict], expected: list[dict]) -> dict[str, list]:
    """The prompts and the expected answers in the form that `main` reads."""
    cells = [r | {"image": r["image"] and base64.b64encode(r["image"]).decode()} for r in rows]
    return {"rows": cells, "expected": expected}


def main(folder: Path, asked: Path, answered: Path) -> None:
    """Load an export and write its answers. `check` runs this in a new process.

    Args:
        folder: A model, or a folder with `base/` and `adapter/`.
        asked: JSON file with `rows` and `expected`.
        answered: JSON file to write.
    """
    quiet_libraries()
    page = read_json(asked)
    rows = [
        r | {"image": r["image"] and base64.b64decode(r["image"], validate=True)}
        for r in page["rows"]
    ]
    whole = folder / "base" if (folder / "base").is_dir() else folder
    # The processor as it was saved, without the corrections that `load_processor` makes.
    config = architecture(ModelConfig(name=str(whole), adapter="full"))
    processor = read_processor(str(whole), None, config.model_type)
    complete(processor, config)
    model = AutoModelForImageTextToText.from_pretrained(
        whole, dtype=compute_dtype(), use_safetensors=True
    )
    model = model.to(device()).eval()
    if whole != folder:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    write_json(answered, answers(model, processor, rows, page["expected"]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
