"""Generate with vLLM instead of transformers. Rows and records have the same form.

vLLM is optional and needs Linux. It wants an older version of transformers than the one that this
package pins, so it has an environment of its own (docs/vllm.md). vLLM can add LoRA weights to a
base model but cannot load a trained projector. An adapter with a trained projector is therefore
first merged into a copy of the base model. vLLM also gets a copy if it reads tensors under other
names than those in the model's files.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import LlavaProcessor, ProcessorMixin

from spavl_lib import machine
from spavl_lib.config import GenerationConfig, ModelConfig
from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import before_padding, end_ids, prefill_ids, prompt_ids
from spavl_lib.errors import InputError
from spavl_lib.modelling.for_vllm import (
    copy_for_vllm,
    has_vllm_names,
    max_lora_rank,
    rename_for_vllm,
)
from spavl_lib.modelling.load import (
    check_adapter,
    device,
    folder_hashes,
    load_model,
    load_processor,
    model_path,
)
from spavl_lib.runs.files import let_others_read
from spavl_lib.runs.paths import cache_root

MERGED = "merged"
# Without a GPU: compilation takes a minute and saves less. And vLLM 0.32 fails if a prompt with a
# seed is split between two steps, so that a step must take the prompts of a whole batch.
ON_CPU = {"enforce_eager": True, "max_num_batched_tokens": 16384}


class VLLMModel:
    """A base model in vLLM, with at most one adapter."""

    def __init__(self, config: ModelConfig, trained: Path | None = None, memory: float = 0.9):
        """Start the engine. Call `close` before another model is loaded.

        Args:
            config: The base model.
            trained: A trainer's `model/`, which holds an adapter or a whole model. None loads the
                base model alone.
            memory: Share of the GPU's memory (without a GPU, of the machine's) that vLLM takes.

        Raises:
            InputError: vLLM is not installed, the base model would be loaded in 4 bits, or the
                adapter belongs to another base or has too large a rank.
        """
        try:
            self.vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise InputError(
                "generation.backend = vllm, but vLLM is not installed. It needs Linux, and an "
                "environment of its own (docs/vllm.md). Set generation.backend=transformers to run "
                "anywhere."
            ) from error
        if config.adapter == "qlora":
            raise InputError(
                "generation.backend = vllm does not load a 4-bit base; set model.adapter = lora"
            )
        base, self.adapter = served(config, trained)
        options: dict[str, Any] = dict(ON_CPU) if device().type == "cpu" else {}
        if self.adapter is not None:
            rank = max_lora_rank(PeftConfig.from_pretrained(self.adapter).r)
            options |= {"enable_lora": True, "max_lora_rank": rank}
        if base == config.name and config.revision:
            options["revision"] = config.revision
        dtype = machine.DTYPES[machine.dtype_name()]
        self.engine = self.vllm.LLM(
            model=base, dtype=dtype, limit_mm_per_prompt={"image": 1},
            gpu_memory_utilization=memory, **options,
        )  # fmt: skip

    def close(self) -> None:
        """Stop the engine and free its memory, which the next model needs."""
        if self.engine is not None:
            self.engine.llm_engine.engine_core.shutdown()
            self.engine = None
            machine.free_memory()

    def answer(
        self, processor: ProcessorMixin, rows: list[dict], config: GenerationConfig, *, seed: int
    ) -> list[dict]:
        """Generate responses to prompt rows.

        Args:
            processor: The model's processor.
            rows: Prompt rows in the schema of `data.schema`, some perhaps with a `prefill`.
            config: Length and sampling.
            seed: Seed of sampling. Each row derives its own seed from this one, because vLLM draws
                the numbers of each request separately.

        Returns:
            For each row `response`, `num_tokens` without EOS, and `finished`: whether the response
            ended before it reached `max_new_tokens`.
        """
        prompts = []
        given = [prefill_ids(processor, row) for row in rows]
        for row, image, first in zip(rows, decode_images(rows), given, strict=True):
            ids = [*prompt_ids(processor, row["prompt"], image=len(image)), *first]
            prompt: dict[str, Any] = {"prompt_token_ids": ids}
            if image:
                prepared = [prepared_image(processor, part) for part in image]
                prompt["multi_modal_data"] = {"image": prepared if prepared[1:] else prepared[0]}
            prompts.append(prompt)
        ends = end_ids(processor)  # vLLM adds the end tokens of the model's generation config
        sampling = [
            self.vllm.SamplingParams(
                max_tokens=config.max_new_tokens,
                temperature=config.temperature if config.do_sample else 0.0,
                top_p=config.top_p if config.do_sample else 1.0,
                seed=derived_seed(seed, number) if config.do_sample else None,
                stop_token_ids=list(ends),
            )
            for number in range(len(rows))
        ]
        request = None
        if self.adapter is not None:
            lora = importlib.import_module("vllm.lora.request")
            request = lora.LoRARequest("trained", 1, str(self.adapter))
        outputs = self.engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        return [
            _answer(o.outputs[0], processor, ends, first)
            for o, first in zip(outputs, given, strict=True)
        ]


def derived_seed(seed: int, part: object) -> int:
    """The seed of a part of the work, such as a batch or a row, from the seed of the whole."""
    return int(hashlib.sha256(f"{seed}/{part}".encode()).hexdigest()[:8], 16)


def prepared_image(processor: ProcessorMixin, image: Image.Image) -> Image.Image:
    """The image as vLLM should get it.

    vLLM prepares images with the processor in the model's folder. For LLaVA-1.5 this package may
    use another one, which pads images instead of cropping them. Such an image is therefore padded
    and resized here. It then has the size of the model's input, so vLLM changes only its scale.

    Args:
        processor: The processor that this package uses.
        image: A decoded image.
    """
    if type(processor) is not LlavaProcessor:
        return image
    pixels = processor.image_processor(
        [before_padding(processor, image)], do_rescale=False, do_normalize=False,
        return_tensors="np",
    )["pixel_values"][0]  # fmt: skip
    return Image.fromarray(np.rint(pixels.transpose(1, 2, 0)).clip(0, 255).astype(np.uint8))


def served(config: ModelConfig, trained: Path | None) -> tuple[str, Path | None]:
    """The weights that vLLM loads, and the adapter that vLLM adds to them.

    Args:
        config: The base model.
        trained: A trainer's `model/`, or None.

    Returns:
        The path or Hub id of the weights, and the adapter's folder or None.

    Raises:
        InputError: The adapter belongs to another base.
    """
    if trained is None:
        return served_base(model_path(config)), None
    merged = trained.parent / MERGED
    if not (trained / "adapter_config.json").is_file():
        return _with_vllm_names(trained, merged), None
    check_adapter(trained, config)
    if not PeftConfig.from_pretrained(trained).modules_to_save:
        return served_base(model_path(config)), trained
    if not (merged / "processor_config.json").is_file():  # this file is written last
        model = PeftModel.from_pretrained(load_model(config), trained).merge_and_unload()
        model.save_pretrained(merged)
        rename_for_vllm(merged)
        let_others_read(merged)
        load_processor(config).save_pretrained(merged)
    return str(merged), None


def served_base(name: str) -> str:
    """A base model for vLLM: its folder or Hub id, or a copy with the names that vLLM reads.

    The copy lies in the cache folder, under a hash of the model's files.

    Args:
        name: Folder or Hub id. Files of the Hub have the names that vLLM reads.
    """
    folder = Path(name)
    if not folder.is_dir() or has_vllm_names(folder):
        return name
    hashes = json.dumps(folder_hashes(folder), sort_keys=True)
    digest = hashlib.sha256(hashes.encode()).hexdigest()[:16]
    return _with_vllm_names(folder, cache_root() / "vllm" / digest)


def _with_vllm_names(folder: Path, copy: Path) -> str:
    if has_vllm_names(folder):
        return str(folder)
    if not copy.is_dir():
        copy_for_vllm(folder, copy)
    return str(copy)


def _answer(
    output: Any, processor: ProcessorMixin, ends: tuple[int, ...], given: list[int]
) -> dict:
    ids = list(output.token_ids)
    finished = output.finish_reason == "stop"
    stopped_by = getattr(output, "stop_reason", None)  # a token id, or None for EOS
    if ids and (ids[-1] in ends or ids[-1] == stopped_by):
        ids.pop()
    text = processor.tokenizer.decode([*given, *ids], skip_special_tokens=True).strip()
    return {"response": text, "num_tokens": len(ids), "finished": finished}
