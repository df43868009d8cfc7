"""Generate with vLLM instead of transformers. Rows and records have the same form.

vLLM is optional and needs Linux and a GPU. It can add LoRA weights to a base model but cannot load
a trained projector. An adapter with a trained projector is therefore first merged into a copy of
the base model.
"""

import importlib
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import ProcessorMixin

from spavl_lib import machine
from spavl_lib.config import GenerationConfig, ModelConfig
from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import end_ids, prefill_ids, prompt_ids
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import load_model, model_path

MERGED = "merged"


class VLLMModel:
    """A base model in vLLM, with at most one adapter."""

    def __init__(self, config: ModelConfig, trained: Path | None = None):
        """Start the engine.

        Args:
            config: The base model.
            trained: A trainer's `model/`, which holds an adapter or a whole model. None loads the
                base model alone.

        Raises:
            InputError: vLLM is not installed, or the base model would be loaded in 4 bits.
        """
        try:
            self.vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise InputError(
                "generation.backend = vllm, but vLLM is not installed. It needs Linux and a GPU "
                "(pip install vllm). Set generation.backend=transformers to run anywhere."
            ) from error
        if config.adapter == "qlora":
            raise InputError(
                "generation.backend = vllm does not load a 4-bit base; set model.adapter = lora"
            )
        base, self.adapter = served(config, trained)
        options: dict[str, Any] = {}
        if self.adapter is not None:
            rank = PeftConfig.from_pretrained(self.adapter).r
            options = {"enable_lora": True, "max_lora_rank": rank}
        if base == config.name and config.revision:
            options["revision"] = config.revision
        dtype = machine.DTYPES[machine.dtype_name()]
        self.engine = self.vllm.LLM(
            model=base, dtype=dtype, limit_mm_per_prompt={"image": 1}, **options
        )

    def answer(
        self, processor: ProcessorMixin, rows: list[dict], config: GenerationConfig, *, seed: int
    ) -> list[dict]:
        """Generate responses to prompt rows.

        Args:
            processor: The model's processor.
            rows: Prompt rows in the schema of `data.schema`, some perhaps with a `prefill`.
            config: Length and sampling.
            seed: Seed of sampling.

        Returns:
            For each row `response`, `num_tokens` without EOS, and `finished`: whether the response
            ended before it reached `max_new_tokens`.
        """
        prompts = []
        given = [prefill_ids(processor, row) for row in rows]
        for row, image, first in zip(rows, decode_images(rows), given, strict=True):
            ids = [*prompt_ids(processor, row["prompt"], image=image is not None), *first]
            data = {} if image is None else {"multi_modal_data": {"image": image}}
            prompts.append({"prompt_token_ids": ids} | data)
        ends = end_ids(processor)  # vLLM adds the end tokens of the model's generation config
        sampling = self.vllm.SamplingParams(
            max_tokens=config.max_new_tokens,
            temperature=config.temperature if config.do_sample else 0.0,
            top_p=config.top_p if config.do_sample else 1.0,
            seed=seed if config.do_sample else None,
            stop_token_ids=list(ends),
        )
        request = None
        if self.adapter is not None:
            lora = importlib.import_module("vllm.lora.request")
            request = lora.LoRARequest("trained", 1, str(self.adapter))
        outputs = self.engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        return [
            _answer(o.outputs[0], processor, ends, first)
            for o, first in zip(outputs, given, strict=True)
        ]


def served(config: ModelConfig, trained: Path | None) -> tuple[str, Path | None]:
    """The weights that vLLM loads, and the adapter that vLLM adds to them.

    Args:
        config: The base model.
        trained: A trainer's `model/`, or None.

    Returns:
        The path or Hub id of the weights, and the adapter's folder or None.
    """
    if trained is None:
        return model_path(config), None
    if not (trained / "adapter_config.json").is_file():
        return str(trained), None
    if not PeftConfig.from_pretrained(trained).modules_to_save:
        return model_path(config), trained
    merged = trained.parent / MERGED
    if not (merged / "processor_config.json").is_file():  # this file is written last
        model = PeftModel.from_pretrained(load_model(config), trained).merge_and_unload()
        model.save_pretrained(merged)
        _processor_of(trained).save_pretrained(merged)
    return str(merged), None


def _processor_of(folder: Path) -> ProcessorMixin:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


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
