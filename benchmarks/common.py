"""What the benchmarks share: a LLaVA of any size, batches of pairs, turns, counts, and JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from trl import DPOConfig, DPOTrainer

from spavl_lib.config import ModelConfig
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.load import compute_dtype, device, load_processor, quiet_libraries
from spavl_lib.modelling.speed.prefix_tree import build_tree

RESULTS = Path(__file__).parent / "results"
IMAGE_TOKEN, PAD = 3, 0


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its rows."""

    hidden: int = 512
    layers: int = 16
    heads: int = 8
    intermediate: int = 1376
    vocabulary: int = 512
    grid: int = 24
    """Patches a side: 24 gives LLaVA-1.5's 576 image tokens."""
    patch: int = 14
    tower_hidden: int = 128
    tower_layers: int = 4
    tower_heads: int = 2
    tower_intermediate: int = 512
    prompt: int = 35
    chosen: int = 100
    rejected: int = 80
    jitter: float = 0.15
    """Lengths vary evenly by this part of themselves."""
    lora_rank: int = 16
    gradient_checkpointing: bool = False

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid**2


SEVEN_B = Shape(
    hidden=4096, layers=32, heads=32, intermediate=11008, vocabulary=32064, tower_hidden=1024,
    tower_layers=24, tower_heads=16, tower_intermediate=4096, lora_rank=128,
    gradient_checkpointing=True,
)  # fmt: skip


def build_model(shape: Shape, *, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random LLaVA of that shape, on the device in its precision, tower frozen."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        intermediate_size=shape.intermediate, max_position_embeddings=8192,
        tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=shape.tower_hidden, num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads, intermediate_size=shape.tower_intermediate,
        image_size=shape.grid * shape.patch, patch_size=shape.patch,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN,
        image_seq_length=shape.image_tokens, pad_token_id=PAD,
    )  # fmt: skip
    with torch.device(device()):
        before = torch.get_default_dtype()
        torch.set_default_dtype(compute_dtype())
        try:
            model = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    model.set_attn_implementation(attention)
    return model.requires_grad_(False)


def build_pairs(shape: Shape, images: int, questions: int, seed: int = 0) -> dict[str, Tensor]:
    """A collated batch, chosen rows first: `questions` pairs for each of `images` pictures."""
    chance = torch.Generator().manual_seed(seed)

    def length(mean: int) -> int:
        spread = int(mean * shape.jitter)
        return mean + int(torch.randint(-spread, spread + 1, (1,), generator=chance))

    def words(mean: int) -> Tensor:
        return torch.randint(4, shape.vocabulary, (length(mean),), generator=chance)

    picture = torch.full((shape.image_tokens,), IMAGE_TOKEN)
    start = torch.cat([torch.tensor([1, 5, 6]), picture])
    prompts = [torch.cat([start, words(shape.prompt)]) for _ in range(images * questions)]
    rows, answers = [], []
    for mean in (shape.chosen, shape.rejected):
        for prompt in prompts:
            answers.append(words(mean))
            rows.append(torch.cat([prompt, answers[-1]]))
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        completion[i, len(row) - len(answer) : len(row)] = 1
    side = shape.grid * shape.patch
    pixels = torch.randn(images, 3, side, side, generator=chance)
    pixels = pixels.repeat_interleave(questions, 0).repeat(2, 1, 1, 1)
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    return {k: v.to(device()) for k, v in batch.items()} | {
        "pixel_values": pixels.to(device(), compute_dtype())
    }


def adapted(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """The model under LoRA on the seven linears, projector trained, adapters moved off zero."""
    config = ModelConfig(
        name="random", adapter="lora", lora_rank=shape.lora_rank, lora_alpha=2 * shape.lora_rank
    )
    torch.manual_seed(1)
    policy = get_peft_model(model, lora_config(model, config))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return policy


def dpo_trainer(policy: PreTrainedModel, shape: Shape, pairs: int, folder: str) -> DPOTrainer:
    """trl's trainer as it comes, over an adapted model; batches are handed to it ready."""
    quiet_libraries()
    arguments = DPOConfig(
        output_dir=folder, per_device_train_batch_size=pairs, max_length=None, report_to=[],
        remove_unused_columns=False, gradient_checkpointing=shape.gradient_checkpointing,
        disable_tqdm=True, use_cpu=device().type == "cpu", bf16=compute_dtype() == torch.bfloat16,
        max_steps=1, learning_rate=0.0,  # an update is made, and moves nothing
    )  # fmt: skip
    rows = Dataset.from_dict({"image": [""], "prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    processor = load_processor(ModelConfig(name="embedded", adapter="full"))
    trainer = DPOTrainer(
        model=policy, args=arguments, train_dataset=rows, processing_class=processor,
        data_collator=lambda batch: batch,
    )  # fmt: skip
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def dpo_step(trainer: DPOTrainer, batch: dict[str, Tensor]) -> float:
    """One whole step: policy, reference, loss, backward, update; the loss."""
    loss = trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return float(loss)


def gradients(trainer: DPOTrainer, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Loss of a batch and the gradient of everything that trains, as one vector."""
    loss = trainer.training_step(trainer.model, dict(batch))
    found = [p.grad.flatten().float() for p in trainer.model.parameters() if p.grad is not None]
    vector = torch.cat(found)
    trainer.optimizer.zero_grad()
    return float(loss), vector


# --- counts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one forward has to do."""

    tokens: int
    """Token positions the language model runs."""
    pairs: int
    """Query-key pairs attention scores, per head and layer."""
    scored: int
    """Positions multiplied with the vocabulary."""
    images: int
    """Images through the tower."""

    def flops(self, shape: Shape, *, backward: bool) -> float:
        """Floating-point operations of matrix products; 2 a multiply-add.

        The backward pass of frozen weights is one more product a linear (towards the input), of
        attention two more of each. LoRA counts where there is a backward pass, with its own
        gradient; the reference is read without it.
        """
        h, passes = shape.hidden, 2 if backward else 1
        linear = 2 * (4 * h * h + 3 * h * shape.intermediate) * self.tokens * passes
        lora = 2 * shape.lora_rank * (8 * h + 3 * (h + shape.intermediate)) * self.tokens
        linear += 3 * lora if backward else 0
        attention = 4 * h * self.pairs * (3 if backward else 1)
        head = 2 * h * shape.vocabulary * self.scored * passes
        t, patches = shape.tower_hidden, shape.image_tokens + 1
        layer = 2 * (4 * t * t + 2 * t * shape.tower_intermediate) * patches + 4 * t * patches**2
        tower = shape.tower_layers * layer * self.images
        return shape.layers * (linear + attention) + head + tower


def plain_work(batch: dict[str, Tensor]) -> Work:
    """What trl runs: every row padded to the longest, every position scored (off Triton)."""
    rows, width = batch["input_ids"].shape
    return Work(rows * width, rows * width * (width + 1) // 2, rows * (width - 1), rows)


def tree_work(batch: dict[str, Tensor], images: int) -> Work:
    """What has to be run: every common beginning once, answers scored."""
    ids, mask = batch["input_ids"].cpu().numpy(), batch["attention_mask"].cpu().numpy() > 0
    keys = []
    for i, (row, keep) in enumerate(zip(ids, mask, strict=True)):
        row = row.astype("int64")
        picture = i % (len(ids) // 2) * images // (len(ids) // 2)
        row[row == IMAGE_TOKEN] = (1 << 40) + picture
        keys.append(row[keep])
    tree = build_tree(keys)
    return Work(tree.size, tree.scored_pairs(), int(batch["completion_mask"].sum()), images)


def matmul_rate(shape: Shape) -> float:
    """Measured FLOP/s of the shape's own middle matrix product in its precision."""
    a = torch.randn(1024, shape.hidden, device=device(), dtype=compute_dtype())
    b = torch.randn(shape.hidden, shape.intermediate, device=device(), dtype=compute_dtype())
    seconds = median_seconds([lambda: a @ b], repeats=20)[0]
    return 2 * a.shape[0] * b.numel() / seconds


# --- turns --------------------------------------------------------------------------------------


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(works: list[Callable[[], object]], *, repeats: int) -> list[float]:
    """Median seconds of each, run in turn, after one round that does not count."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for kept, work in zip(times, works, strict=True):
            synchronise()
            start = time.perf_counter()
            work()
            synchronise()
            if turn:
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def peak_bytes() -> int:
    """Most memory this process has held: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # a child's ru_maxrss begins with what its parent held
        words = status.read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def baseline_bytes() -> int:
    """What a process holds once everything is imported; nothing on a GPU."""
    return 0 if torch.cuda.is_available() else peak_bytes()


def peak_in_child(script: str, *arguments: str) -> int:
    """Peak of a fresh process that does one variant's step and prints `peak_bytes`."""
    command = [sys.executable, "-m", f"benchmarks.{script}", "--peak-of", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def finish(name: str, metrics: dict, *, results: Path | None = None) -> None:
    """Write `results/<name>.json`, and print it as the last line."""
    packages = ("torch", "transformers", "trl", "peft")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    page = {
        "name": name,
        "device": gpu or f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "metrics": _rounded(metrics),
    }
    folder = results or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "_gpu" if gpu else ""
    text = json.dumps(page, indent=1) + "\n"
    (folder / f"{name}{suffix}.json").write_text(text, encoding="utf-8")
    print(json.dumps(page))


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    options = argparse.ArgumentParser(description=description.split("\n\n")[0])
    options.add_argument("--full", action="store_true", help="the 7B shape; wants a GPU")
    options.add_argument("--repeats", type=int, default=3, help="timed turns of each variant")
    options.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    return options


def side_by_side(commands: list[list[str]], workers: int) -> None:
    """Run modules as processes, several at a time. If one fails, start no more of them and exit.

    Args:
        commands: Module and arguments of each process.
        workers: Processes at a time. If more than one, each has one thread.
    """
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {})

    def run(command: list[str]) -> int:
        return subprocess.run([sys.executable, "-m", *command], env=env).returncode

    with ThreadPoolExecutor(workers) as pool:
        if any(pool.map(run, commands)):
            pool.shutdown(cancel_futures=True)
            sys.exit("a training failed; see above, and repeat the command to go on")
