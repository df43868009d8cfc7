"""Peak memory of a training, by part, in bytes.

Weights and optimizer state are counted exactly. Activations are counted layer by layer from what
autograd keeps for the backward pass. `benchmarks/planner.py` compares the result with measured
peaks.
"""

from dataclasses import dataclass

from spavl_lib.config import Config, ModelConfig
from spavl_lib.planning.shapes import Shape

# Bytes per value.
FP32, HALF = 4, 2
ADAM = 8  # AdamW's two moments of a trained value, in fp32
# NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3): 4 bits a
# value, an 8-bit scale for each block of 64 values, and an fp32 scale for each 256 of these scales.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)

PROMPT = 160  # tokens assumed for a question with its chat template, without the image
# Token and vocabulary chunk of trl's language-model head, which scores one such tile at a time
# (trl.kernels.chunked_divergence).
TILE = (4096, 32768)
# Measured with torch's profiler: fp32 tiles that the backward pass of that head holds without
# Triton, the mask of a byte a value included.
CPU_TILES = 8.25
# What CUDA's caching allocator holds beyond the tensors; a rough share, not measured.
ALLOCATOR_SLACK = 0.04


@dataclass(frozen=True)
class Batch:
    """The largest batch a device computes."""

    rows: int
    tokens: int
    """Tokens of its longest row, with image tokens."""
    answer: int
    """Tokens of its longest answer."""

    def positions(self, shared: bool) -> int:
        """Tokens the decoder layers compute. With shared prefixes a pair's prompt counts once."""
        if not shared:
            return self.rows * self.tokens
        return self.rows // 2 * (self.tokens + self.answer)


def longest_batch(kind: str, config: Config, shape: Shape, tokens: int) -> Batch:
    """The batch to plan for, if no batch has been seen.

    Args:
        kind: reward, dpo or ppo.
        config: The run's config.
        shape: Sizes of the model.
        tokens: Tokens of the longest row; 0 for the trainer's `max_length`.
    """
    section, question = getattr(config, kind), shape.image_tokens + PROMPT
    longest = tokens or min(filter(None, (section.max_length or 2048, shape.context)))
    if kind == "ppo":
        answer = section.max_new_tokens
        if section.sft_coef:  # chosen answers are computed in batches of as many rows
            answer = max(answer, longest - question)
        return Batch(section.per_device_batch_size, tokens or question + answer, answer)
    tokens = longest
    return Batch(2 * section.per_device_batch_size, tokens, max(1, tokens - question))


def batches_per_step(kind: str, config: Config) -> int:
    """Device batches, over all processes, that one optimizer step sums."""
    section = getattr(config, kind)
    if kind != "ppo":
        return section.gradient_accumulation_steps
    rows = section.rollout_batch_size / section.num_minibatches
    return max(1, round(rows / section.per_device_batch_size))


def peak_bytes(
    kind: str, config: Config, shape: Shape, batch: Batch, cpu: bool
) -> dict[str, float]:
    """Peak memory by part.

    Args:
        kind: reward, dpo or ppo.
        config: The run's config.
        shape: Sizes of the model.
        batch: The largest batch.
        cpu: Whether the device is the CPU, where everything is in fp32.
    """
    memory = _static(kind, config, shape, cpu)
    peak = _step_peak(kind, config, shape, batch, cpu)
    if not cpu and kind == "ppo":
        # Sampling holds a KV cache and no activations, so only the larger of the two counts.
        cache = shape.layers * 2 * shape.kv_width * HALF * batch.rows * batch.tokens
        memory["KV cache"] = max(0.0, cache - sum(peak.values()))
    return memory | peak


def trained_values(kind: str, config: ModelConfig, shape: Shape) -> dict[str, int]:
    """Number of values that are trained, by part.

    Args:
        kind: reward, dpo or ppo.
        config: Which parts train.
        shape: Sizes of the model.
    """
    projector = shape.parts.get("projector", 0) if config.train_projector else 0
    copies = 2 if kind == "ppo" else 1  # policy and value model
    if config.with_lora:
        return {
            "adapters": copies * config.lora_rank * shape.lora_inputs,
            "projector": copies * projector,
        }
    language = shape.parts["language"] if config.adapter == "full" else 0
    head = shape.parts.get("head", 0) if config.adapter == "full" and kind != "reward" else 0
    return {"language": copies * language, "head": head, "projector": copies * projector}


def _static(kind: str, config: Config, shape: Shape, cpu: bool) -> dict[str, float]:
    """Bytes held all the time: weights, adapters, the reference, optimizer state."""
    model, launch = config.model, config.launch
    half = FP32 if cpu else HALF
    everything = sum(shape.parts.values())
    trained = trained_values(kind, model, shape)
    count = sum(trained.values())
    share = launch.num_processes if launch.engine != "ddp" else 1
    # PPO samples with every parameter gathered, so its peak is that of whole copies.
    sharded = launch.engine == "zero3" and kind != "ppo"
    whole = launch.num_processes if sharded else 1
    if model.with_lora:
        base: float = half * everything
        if model.adapter == "qlora":
            base = half * (everything - shape.linears) + NF4 * shape.linears
        if kind == "ppo":  # the reward model's frozen adapter and projector
            base += FP32 * (model.lora_rank * shape.lora_inputs + shape.parts.get("projector", 0))
        memory = {"weights": base / whole, "adapters": FP32 * count / whole}
    else:
        # fp32 master weights. DeepSpeed in 16 bit keeps its own, beside a 16-bit model.
        deepspeed = launch.engine != "ddp" and not cpu
        copies = 2 if kind == "ppo" else 1
        memory = {
            "weights": (half if deepspeed else FP32) * copies * everything / whole,
            "masters": FP32 * count / share if deepspeed else 0.0,
        }
        frozen_copies = {"dpo": 0 if config.dpo.cache_reference else 1, "reward": 0, "ppo": 2}[kind]
        memory["reference"] = half * frozen_copies * everything / whole
        if not cpu and not deepspeed:  # autocast keeps 16-bit copies during the whole forward pass
            memory["autocast copies"] = 2.0 * copies * shape.linears
    offload = launch.cpu_offload and launch.engine != "ddp"
    memory["optimizer"] = 0.0 if offload else ADAM * count / share
    if offload:
        memory["masters"] = 0.0
    return memory


def _widths(config: ModelConfig, cpu: bool) -> tuple[int, int]:
    """Bytes of a value in the residual stream, and of a value inside a layer."""
    if cpu:
        return FP32, FP32
    return (FP32 if config.adapter == "full" else HALF), HALF


def _layer_bytes(config: ModelConfig, shape: Shape, batch: Batch, shared: bool, cpu: bool) -> float:
    """Bytes that autograd keeps for one decoder layer.

    A Llama layer keeps: its input, the normed input (twice if the norm's weight trains: before and
    after that weight), query, key, value, the output of attention, the residual after attention and
    its normed form; in the MLP gate, activation of gate, up, and the product of the last two.

    With shared prefixes each answer attends to a copy of its prompt's keys and values beside its
    own, and the outputs by segment are kept beside the row that joins them.
    """
    full = config.adapter == "full"
    h, kv, i = shape.hidden, shape.kv_width, shape.intermediate
    stream, inner = _widths(config, cpu)
    kept = stream * 2 * h + inner * (2 * h + 2 * h + 2 * kv) + inner * 4 * i
    kept += FP32 * shape.heads  # log-sum-exp of attention
    if full:
        kept += stream * 2 * h
    if not cpu:  # norms compute in fp32 and keep that
        kept += FP32 * 2 * h
    if config.with_lora:
        kept += FP32 * config.lora_rank * len(config.lora_targets)
        if not cpu:  # autocast casts the adapters' input again for each linear layer
            kept += HALF * h
    copies = 0
    if shared:
        kept += inner * (h + 2 * (h - kv))  # query heads that share keys get copies of them
        copies = inner * 2 * h * batch.rows * batch.tokens
    return kept * batch.positions(shared) + copies


def _step_peak(
    kind: str, config: Config, shape: Shape, batch: Batch, cpu: bool
) -> dict[str, float]:
    """Largest sum, over the moments of a step, of gradients, activations and logits, in bytes."""
    model = config.model
    shared = model.share_prefix != "off" and kind != "ppo"
    positions = batch.positions(shared)
    stream, inner = _widths(model, cpu)
    layer = _layer_bytes(model, shape, batch, shared, cpu)
    residual = stream * positions * shape.hidden
    # What a layer holds only while it is computed: forward gate, up and their product, if nothing
    # is kept; backward the gradients of these three. And the residual with its normed form.
    passing = positions * (inner * 3 * shape.intermediate + stream * 2 * shape.hidden)
    if model.adapter == "qlora":  # the weight of one linear layer in 16 bit, while it is used
        passing += inner * shape.hidden * shape.intermediate
    trained = trained_values(kind, model, shape)
    share = config.launch.num_processes if config.launch.engine != "ddp" else 1
    roles = 2 if kind == "ppo" else 1  # the policy's gradients wait for those of the value model
    language = (trained.get("language", 0) + trained.get("adapters", 0)) / roles
    embedding = shape.vocabulary * shape.hidden if model.adapter == "full" else 0
    per_layer = FP32 * (language - embedding) / shape.layers / share
    head_gradient = FP32 * trained.get("head", 0) / share
    ends = FP32 * (embedding + trained["projector"] / roles) / share + head_gradient
    policy = per_layer * shape.layers + ends
    all_roles = policy + (roles - 1) * (policy - head_gradient)
    accumulates = batches_per_step(kind, config) > config.launch.num_processes
    waiting = all_roles if accumulates else all_roles - policy
    full = model.adapter == "full"
    # The last layer's output, its norm, and the rows that the output is copied back into.
    outer = residual * (3 if full else 2) + stream * batch.rows * batch.tokens * shape.hidden
    kept, recomputed = (residual, layer) if model.gradient_checkpointing else (layer, 0.0)
    held = outer + kept * shape.layers
    logits = _logits(kind, config, shape, batch, cpu)
    # The moments of a step as (activations, logits, gradients). In the backward pass activations
    # are freed as gradients come.
    moments = [(held, logits, (policy if accumulates else 0.0) + head_gradient)]
    if kind == "dpo" and not config.dpo.cache_reference:
        moments.append((held + passing, 0.0, waiting))
    for left in range(shape.layers, 0, -1):
        grown = head_gradient + per_layer * (shape.layers - left + 1)
        # Gradients that exist already are added to in place.
        gradients = waiting if accumulates else waiting + grown
        moments.append((residual + kept * left + recomputed + passing, 0.0, gradients))
    # All gradients. Checking that the largest one is finite holds its absolute value and masks.
    largest = max(embedding, shape.hidden * shape.intermediate if full else 0)
    moments.append((7.0 * largest / share, 0.0, all_roles))
    activations, logits, gradients = max(moments, key=sum)
    return {"gradients": gradients, "activations": activations, "logits": logits}


def _logits(kind: str, config: Config, shape: Shape, batch: Batch, cpu: bool) -> float:
    """Bytes of scores over the vocabulary that are held at once.

    PPO scores the answers: logits, log-probabilities, and for the entropy the probabilities and
    their product with the log-probabilities. trl's head works in tiles: one 16-bit buffer with
    Triton; elsewhere its backward pass holds logits, two scalings of them, log-probabilities,
    probabilities, the gradient, the targets as ones and zeros, their difference from the
    probabilities, and a mask.
    """
    if kind == "reward":
        return 0.0
    if kind == "ppo":
        return 4.0 * FP32 * batch.rows * batch.answer * shape.vocabulary
    # Without shared prefixes trl's own head runs; on a CPU it scores every position.
    length = batch.tokens if cpu and config.model.share_prefix == "off" else batch.answer
    tile = min(batch.rows * length, TILE[0]) * min(shape.vocabulary, TILE[1])
    return (CPU_TILES * FP32 if cpu else 2.0) * tile
