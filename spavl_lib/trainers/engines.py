"""Engines run backward passes, clip gradients, step the optimizer, and collect checkpoint tensors.

PPO's training loop uses an engine, and calls both kinds in the same way. With `Engine` every
process holds all tensors; a single process uses `Engine` too. With `ZeroEngine` DeepSpeed shards
the optimizer state and the gradients (ZeRO-2), and under ZeRO-3 also the parameters.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spavl_lib import machine
from spavl_lib.config import LaunchConfig
from spavl_lib.distributed import group, settings, zero_parameters
from spavl_lib.errors import NonFiniteError
from spavl_lib.modelling.load import compute_dtype, device
from spavl_lib.runs.files import read_json
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.guards import OWN_SCALE, REMEDY, gate_gradients
from spavl_lib.trainers.zero_state import load_optimizer_share, optimizer_share

Groups = dict[str, list[nn.Parameter]]


def build_engine(
    model: nn.Module, groups: Groups, optimizer: torch.optim.Optimizer, launch: LaunchConfig
) -> "Engine":
    """Build the engine that `launch.engine` names.

    Args:
        model: Module that holds every parameter in use, trained or not.
        groups: Name of each group -> its parameters. The gradients of a group are clipped together.
        optimizer: Optimizer whose parameter groups are these groups, in the same order.
        launch: Settings that name the engine and the number of processes.

    Raises:
        RuntimeError: The number of running processes is not `launch.num_processes`.
    """
    kind = Engine if launch.engine == "ddp" else ZeroEngine
    return kind(model, groups, optimizer, launch)


class Engine:
    """An engine in which every process holds all tensors.

    Before each optimizer step the gradients are summed over the processes.

    Args:
        model: See `build_engine`.
        groups: See `build_engine`.
        optimizer: See `build_engine`.
        launch: See `build_engine`.
    """

    lockstep = False
    """Whether all processes must call the model together, because its parameters are sharded."""
    skipped = False
    """Whether the loss scaler skipped the last step, because the scaled gradient overflowed."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        optimizer: torch.optim.Optimizer,
        launch: LaunchConfig,
    ):
        self.model, self.groups, self.optimizer = model, groups, optimizer
        self.scaler = torch.amp.GradScaler(device().type, enabled=compute_dtype() == torch.float16)
        self.engine_found = self._start(launch)

    def _start(self, launch: LaunchConfig) -> dict[str, Any]:
        group = torch.distributed
        size = group.get_world_size() if group.is_initialized() else 1
        if not size == machine.world_size() == launch.num_processes:
            raise RuntimeError(
                f"asked for {launch.num_processes} processes, got {size}; call `pipeline.train`, "
                "which starts them"
            )
        return {"engine": "ddp" if size > 1 else "none", "world_size": size}

    @property
    def sharing(self) -> str:
        """How processes hold the optimizer state: `whole`, or a description of the shards."""
        return "whole"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass. `backward` may follow."""
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Open a context in which each process may call the model by itself, without gradients."""
        yield

    def zero_grad(self) -> None:
        """Clear the gradients. Call it before a step's first backward pass."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of one part of the step's loss.

        Args:
            loss: One part () of the loss. The step's loss is the sum of all parts of all processes.
            last: Whether this is the step's last part in this process.
        """
        self.scaler.scale(loss).backward()

    def step(self, max_norm: float, number: int, row_ids: Sequence[str]) -> dict[str, float]:
        """Check, clip and apply the gradients.

        Args:
            max_norm: Largest norm of each group's gradient.
            number: Number of the step, for messages.
            row_ids: Rows of the step, for messages.

        Returns:
            Norm of each group's gradient before clipping.

        Raises:
            NonFiniteError: A gradient is NaN or infinite, although the loss scale is 1 or less;
                nothing was updated.
        """
        self._sum()
        scale = self.scaler.get_scale()  # 1 if there is no scaler
        self.scaler.unscale_(self.optimizer)
        # A large loss scale can make fp16 gradients infinite. The loss scaler then skips the step
        # and lowers the scale. At `OWN_SCALE` or below, the scale cannot be the cause.
        if scale <= OWN_SCALE:
            gate_gradients(self.model, number, list(row_ids))
        norms = {
            name: torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
            for name, parameters in self.groups.items()
        }
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped = self.scaler.get_scale() < scale
        return norms

    def _sum(self) -> None:
        """Sum the gradients over the processes, group by group. A missing gradient counts as 0."""
        if machine.world_size() == 1:
            return
        for parameters in self.groups.values():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            total = group.sum_of(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for parameter, summed in zip(
                parameters, total.split([p.numel() for p in parameters]), strict=True
            ):
                parameter.grad = summed.view_as(parameter).to(parameter.dtype, copy=True)

    # --- checkpoints --------------------------------------------------------------------------

    def tensors(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Return the tensors that this process must write into a checkpoint, and the JSON state.

        Returns:
            Weights and optimizer state, as file stem -> name -> tensor; and the JSON values.
        """
        optimizer, plain = optimizer_share(self.optimizer)
        tensors = {"trainable": ckpt.trainable_tensors(self.model), "optimizer": optimizer}
        if not machine.is_main():
            tensors = {}
        return tensors, {"optimizer": plain, "scaler": self.scaler.state_dict()}

    def load(self, source: Any, state: dict) -> None:
        """Load a checkpoint.

        Args:
            source: The checkpoint's folder.
            state: JSON state of the checkpoint.

        Raises:
            InputError: The checkpoint does not fit the model.
        """
        ckpt.load_trainable(self.model, ckpt.load_tensors(source, "trainable"), source)
        ckpt.load_optimizer(
            self.optimizer, ckpt.load_tensors(source, "optimizer"), state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])


class ZeroEngine(Engine):
    """An engine that uses DeepSpeed's ZeRO, but clips each group of parameters separately.

    DeepSpeed sums gradients until its gradient accumulation boundary is set. This engine sets the
    boundary only for the last backward pass of a step. One optimizer step can therefore follow any
    number of backward passes through different adapters.

    Args:
        model: See `build_engine`.
        groups: See `build_engine`.
        optimizer: See `build_engine`.
        launch: See `build_engine`.
    """

    def _start(self, launch: LaunchConfig) -> dict[str, Any]:
        import deepspeed

        options = read_json(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]))
        options["bf16"]["enabled"] = compute_dtype() == torch.bfloat16
        options["fp16"]["enabled"] = compute_dtype() == torch.float16
        options |= {
            "gradient_clipping": 0.0,  # `step` clips each group
            "gradient_accumulation_steps": 1,
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": launch.num_processes,
        }
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=options
        )
        self.lockstep = launch.engine == "zero3"
        self.scaler = torch.amp.GradScaler(enabled=False)  # DeepSpeed scales the loss
        self.name = launch.engine
        return settings.check_engine(self.engine, launch)

    @property
    def sharing(self) -> str:
        """See `Engine.sharing`."""
        return f"by {self.name} in {machine.world_size()} processes"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `Engine.__call__`."""
        return self.engine(*args, **kwargs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Open a context with ZeRO-3's parameters gathered and its hooks removed."""
        if self.name != "zero3":
            yield
            return
        from trl.models.utils import add_hooks, remove_hooks

        with zero_parameters.gathered_parameters(self.model):
            remove_hooks(self.engine)
            try:
                yield
            finally:
                add_hooks(self.engine)

    def zero_grad(self) -> None:
        """See `Engine.zero_grad`."""
        self.engine.zero_grad()
        if self.lockstep:
            # ZeRO-3 overwrites gradients in a step's first backward pass only, and adds to them in
            # later passes. The first pass trains the policy, so without this line the value model's
            # gradient would be added to its gradient of the previous step.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`.

        DeepSpeed averages gradients over the processes. Multiplying the loss by the number of
        processes turns the mean into the sum.

        Args:
            loss: See `Engine.backward`.
            last: See `Engine.backward`.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * machine.world_size())

    def step(self, max_norm: float, number: int, row_ids: Sequence[str]) -> dict[str, float]:
        """See `Engine.step`.

        Args:
            max_norm: See `Engine.step`.
            number: See `Engine.step`.
            row_ids: See `Engine.step`.

        Returns:
            Norm of each group's gradient before clipping.

        Raises:
            NonFiniteError: A gradient is NaN or infinite; nothing was updated.
        """
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        norms, loss_scale = {}, self.engine.optimizer.loss_scale  # the scale is 1 except in fp16
        for name, parameters in self.groups.items():
            squares = 0.0
            for parameter in parameters:
                gradient = safe_get_full_grad(parameter)
                if gradient is not None:
                    squares += gradient.float().square().sum().item()
            norms[name] = math.sqrt(squares) / loss_scale if math.isfinite(squares) else squares
            scale = max_norm / (norms[name] + 1e-6)  # the formula of torch's clip_grad_norm_
            if scale < 1:
                for parameter in parameters:
                    gradient = safe_get_full_grad(parameter)
                    if gradient is not None:
                        safe_set_full_grad(parameter, gradient * scale)
        finite = all(map(math.isfinite, norms.values()))
        if not finite and (not self.engine.fp16_enabled() or loss_scale <= OWN_SCALE):
            raise NonFiniteError(
                f"step {number}: the gradient is not finite on rows {', '.join(row_ids)}; {REMEDY}"
            )
        self.engine.step()
        self.skipped = self.engine.fp16_enabled() and not finite
        return norms

    def tensors(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """See `Engine.tensors`."""
        trained = ckpt.trainable_tensors(self.model)
        optimizer, plain = optimizer_share(self.engine.optimizer)
        tensors = {"optimizer": optimizer} | ({"trainable": trained} if machine.is_main() else {})
        return tensors, {"optimizer": plain, "scaler": {}}

    def load(self, source: Any, state: dict) -> None:
        """See `Engine.load`. The weights are restored from the optimizer's master weights."""
        share = ckpt.load_tensors(source, "optimizer", machine.rank())
        load_optimizer_share(self.engine.optimizer, share, state["optimizer"])
