"""Peak memory of a training, by part, in bytes.

Weights and optimizer state are counted from the model's shapes. Activations are counted layer by
layer, from the tensors that autograd keeps for the backward pass. `benchmarks/planner.py` compares
the result with measured peaks.
"""

from dataclasses import dataclass

from spavl_lib.config import Config, ModelConfig
from spavl_lib.planning.rows import Lengths
from spavl_lib.planning.shapes import Shape

# Bytes per value.
FP32, HALF = 4, 2
ADAM = 8  # AdamW's two moments of a trained value, in fp32
# NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3): 4 bits
# per value, an 8-bit scale per block of 64 values, and an fp32 scale per 256 of these scales.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)

PROMPT = 160  # tokens assumed for a question with its chat template, without the image
# Size of a tile (tokens, vocabulary) of trl's language-model head, which computes the logits of one
# tile at a time (trl.kernels.chunked_divergence).
TILE = (4096, 32768)
# Number of fp32 tiles that the head's backward pass holds at once without Triton, measured with
# torch's profiler. It includes a mask of one byte per value.
CPU_TILES = 8.25
# Memory that CUDA's caching allocator holds beyond the tensors, as a share of the tensors. A rough
# assumption, not measured.
ALLOCATOR_SLACK = 0.04


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch that a device computes."""

    rows: int
    tokens: int
    """Tokens of the longest row, image tokens included."""
    answer: int
    """Tokens of the longest response."""

    def positions(self, shared: bool) -> int:
        """Number of tokens that the decoder layers compute.

        With shared prefixes (`shared`) a pair's prompt counts once.
        """
        if not shared:
            return self.rows * self.tokens
        return self.rows // 2 * (self.tokens + self.answer)


def longest_batch(
    kind: str, config: Config, shape: Shape, tokens: int, lengths: Lengths | None = None
) -> Batch:
    """The micro-batch to plan for, computed from the settings and from the rows if they are known.

    Args:
        kind: reward, dpo or ppo.
        config: The run's config.
        shape: Sizes of the model.
        lengths: The lengths of the training rows, unless `tokens` is given.
        tokens: Tokens of the longest row. For reward and dpo, 0 uses the trainer's `max_length`, or
            2,048 if that is 0 too, but at most the model's context. For ppo, 0 uses an assumed
            prompt plus `max_new_tokens`. With `ppo.sft_coef`, chosen responses may be longer; then
            the length is that for reward and dpo.
    """
    section, question = getattr(config, kind), shape.image_tokens + PROMPT
    if lengths and not tokens:
        longest = min(filter(None, (lengths.longest, section.max_length, shape.context)))
        if kind != "ppo":
            return Batch(2 * section.per_device_batch_size, longest, lengths.longest_answer)
        answer = section.max_new_tokens
        sampled = lengths.longest_prompt + answer
        if section.sft_coef:
            sampled, answer = max(sampled, longest), max(answer, lengths.longest_answer)
        return Batch(section.per_device_batch_size, sampled, answer)
    longest = tokens or min(filter(None, (section.max_length or 2048, shape.context)))
    if kind == "ppo":
        answer = section.max_new_tokens
        if section.sft_coef:  # micro-batches of chosen responses have as many rows
            answer = max(answer, longest - question)
        return Batch(section.per_device_batch_size, tokens or question + answer, answer)
    tokens = longest
    return Batch(2 * section.per_device_batch_size, tokens, max(1, tokens - question))


def batches_per_step(kind: str, config: Config) -> int:
    """Number of micro-batches in one optimizer step, over all processes."""
    section = getattr(config, kind)
    if kind != "ppo":
        return section.gradient_accumulation_steps
    rows = section.rollout_batch_size / section.num_minibatches
    return max(1, round(rows / section.per_device_batch_size))


def peak_bytes(
    kind: str, config: Config, shape: Shape, batch: Batch, cpu: bool
) -> dict[str, float]:
    """Peak memory of each device by part, in bytes.

    Args:
        kind: reward, dpo or ppo.
        config: The run's config.
        shape: Sizes of the model.
        batch: The largest micro-batch.
        cpu: Whether the device is the CPU, on which all tensors are fp32.
    """
    memory = _static(kind, config, shape, cpu)
    peak = _step_peak(kind, config, shape, batch, cpu)
    if not cpu and kind == "ppo":
        # Sampling holds a KV cache, and updates hold activations, gradients and logits. They do not
        # overlap in time. So only the part of the KV cache that exceeds the others is added.
        cache = shape.layers * 2 * shape.kv_width * HALF * batch.rows * batch.tokens
        memory["KV cache"] = max(0.0, cache - sum(peak.values()))
    return memory | peak


def trained_values(kind: str, config: ModelConfig, shape: Shape) -> dict[str, int]:
    """Number of trained values, by part.

    Args:
        kind: reward, dpo or ppo.
        config: Settings that say which parts train.
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
    """Bytes held during the whole training: weights, adapters, reference, optimizer state."""
    model, launch = config.model, config.launch
    half = FP32 if cpu else HALF
    everything = sum(shape.parts.values())
    trained = trained_values(kind, model, shape)
    count = sum(trained.values())
    share = launch.num_processes if launch.engine != "ddp" else 1
    # PPO gathers all parameters to sample, so at its peak every process holds complete models.
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
        # Without DeepSpeed the weights are fp32. DeepSpeed on a GPU holds 16-bit weights, and fp32
        # master weights besides.
        deepspeed = launch.engine != "ddp" and not cpu
        copies = 2 if kind == "ppo" else 1
        memory = {
            "weights": (half if deepspeed else FP32) * copies * everything / whole,
            "masters": FP32 * count / share if deepspeed else 0.0,
        }
        frozen_copies = {"dpo": int(config.dpo.runs_reference), "reward": 0, "ppo": 2}[kind]
        memory["reference"] = half * frozen_copies * everything / whole
        if not cpu and not deepspeed:  # autocast keeps 16-bit copies during a forward pass
            memory["autocast copies"] = 2.0 * copies * shape.linears
    offload = launch.cpu_offload and launch.engine != "ddp"
    memory["optimizer"] = 0.0 if offload else ADAM * count / share
    if offload:
        memory["masters"] = 0.0
    return memory


def _widths(config: ModelConfig, cpu: bool) -> tuple[int, int]:
    """Bytes per value in the residual stream, and bytes per value inside a layer."""
    if cpu:
        return FP32, FP32
    return (FP32 if config.adapter == "full" else HALF), HALF


def _layer_bytes(config: ModelConfig, shape: Shape, batch: Batch, shared: bool, cpu: bool) -> float:
    """Bytes that autograd keeps for one decoder layer.

    For the attention part of a Llama layer, autograd keeps the input, the normed input, query, key,
    value, the attention output, the residual after attention, and the normed residual. A normed
    tensor is kept twice if the norm's weight trains: before and after the product with the weight.
    For the MLP, autograd keeps gate, activated gate, up, and the product of activated gate and up.

    With shared prefixes each response also needs a copy of its prompt's keys and values. The
    outputs of all segments are kept twice: separately, and joined into one row.
    """
    full = config.adapter == "full"
    h, kv, i = shape.hidden, shape.kv_width, shape.intermediate
    stream, inner = _widths(config, cpu)
    kept = stream * 2 * h + inner * (2 * h + 2 * h + 2 * kv) + inner * 4 * i
    kept += FP32 * shape.heads  # log-sum-exp of attention
    if full:
        kept += stream * 2 * h
    if not cpu:  # norms compute in fp32, and keep fp32 tensors
        kept += FP32 * 2 * h
    if config.with_lora:
        kept += FP32 * config.lora_rank * len(config.lora_targets)
        if not cpu:  # autocast keeps a 16-bit copy of the adapters' input
            kept += HALF * h
    copies = 0
    if shared:
        # The joined output, and a copy of grouped keys and values for each query head.
        kept += inner * (h + 2 * (h - kv))
        copies = inner * 2 * h * batch.rows * batch.tokens
    return kept * batch.positions(shared) + copies


def _step_peak(
    kind: str, config: Config, shape: Shape, batch: Batch, cpu: bool
) -> dict[str, float]:
    """Bytes of gradients, activations and logits at the moment of a step with the largest sum."""
    model = config.model
    shared = model.share_prefix != "off" and kind != "ppo"
    positions = batch.positions(shared)
    stream, inner = _widths(model, cpu)
    layer = _layer_bytes(model, shape, batch, shared, cpu)
    residual = stream * positions * shape.hidden
    # Memory that a layer holds only while it is computed. In a forward pass without gradients these
    # are gate, up and their product; in a backward pass their gradients. Added to them are the
    # residual and its normed form.
    transient = positions * (inner * 3 * shape.intermediate + stream * 2 * shape.hidden)
    if model.adapter == "qlora":  # one linear layer's weight in 16 bits, while the layer runs
        transient += inner * shape.hidden * shape.intermediate
    trained = trained_values(kind, model, shape)
    share = config.launch.num_processes if config.launch.engine != "ddp" else 1
    roles = 2 if kind == "ppo" else 1  # one optimizer step applies both roles' gradients
    language = (trained.get("language", 0) + trained.get("adapters", 0)) / roles
    embedding = shape.vocabulary * shape.hidden if model.adapter == "full" else 0
    per_layer = FP32 * (language - embedding) / shape.layers / share
    head_gradient = FP32 * trained.get("head", 0) / share
    ends = FP32 * (embedding + trained["projector"] / roles) / share + head_gradient
    policy = per_layer * shape.layers + ends
    all_roles = policy + (roles - 1) * (policy - head_gradient)
    accumulates = batches_per_step(kind, config) > config.launch.num_processes
    earlier_gradients = all_roles if accumulates else all_roles - policy
    full = model.adapter == "full"
    # The last layer's output, the normed output, and the rows into which the output is copied back.
    outer = residual * (3 if full else 2) + stream * batch.rows * batch.tokens * shape.hidden
    kept, recomputed = (residual, layer) if model.gradient_checkpointing else (layer, 0.0)
    held = outer + kept * shape.layers
    logits = _logits(kind, config, shape, batch, cpu)
    # The moments of a step as (activations, logits, gradients). During the backward pass
    # activations are freed while gradients are added.
    moments = [(held, logits, (policy if accumulates else 0.0) + head_gradient)]
    if kind == "dpo" and config.dpo.runs_reference:
        moments.append((held + transient, 0.0, earlier_gradients))
    for layers_left in range(shape.layers, 0, -1):
        new_gradients = head_gradient + per_layer * (shape.layers - layers_left + 1)
        # If gradients of earlier micro-batches exist, new gradients are added to them in place.
        gradients = earlier_gradients if accumulates else earlier_gradients + new_gradients
        moments.append((residual + kept * layers_left + recomputed + transient, 0.0, gradients))
    # At the end of the step all gradients exist. The check for NaN and infinity then also holds
    # masks and the absolute value of the largest gradient.
    largest = max(embedding, shape.hidden * shape.intermediate if full else 0)
    moments.append((7.0 * largest / share, 0.0, all_roles))
    activations, logits, gradients = max(moments, key=sum)
    return {"gradients": gradients, "activations": activations, "logits": logits}


def _logits(kind: str, config: Config, shape: Shape, batch: Batch, cpu: bool) -> float:
    """Bytes of logits, and of other tensors over the vocabulary, that are held at once.

    PPO holds four such tensors at the response positions: logits, log-probabilities, and for the
    entropy the probabilities and their product with the log-probabilities.

    trl's head works in tiles. With Triton it holds one 16-bit buffer. Without Triton its backward
    pass holds the logits, two scaled copies of them, log-probabilities, probabilities, the
    gradient, the one-hot targets, their difference from the probabilities, and a mask.
    """
    if kind == "reward":
        return 0.0
    if kind == "ppo":
        return 4.0 * FP32 * batch.rows * batch.answer * shape.vocabulary
    # Without shared prefixes trl's own head runs. On a CPU it computes logits at every position.
    length = batch.tokens if cpu and config.model.share_prefix == "off" else batch.answer
    tile = min(batch.rows * length, TILE[0]) * min(shape.vocabulary, TILE[1])
    return (CPU_TILES * FP32 if cpu else 2.0) * tile
