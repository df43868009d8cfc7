"""Engines: backward pass, clipping, optimizer step and checkpoints of a hand-written loop.

`Engine` holds everything in every process, whether there is one or several. `ZeroEngine` lets
DeepSpeed shard optimizer state and gradients (ZeRO-2), and parameters too (ZeRO-3). A loop takes
the same optimizer steps with each of them.
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
        groups: Parameters that are clipped together, by the group's name.
        optimizer: Optimizer over the groups, in this order.
        launch: Engine and number of processes.

    Raises:
        RuntimeError: The number of running processes is not `launch.num_processes`.
    """
    kind = Engine if launch.engine == "ddp" else ZeroEngine
    return kind(model, groups, optimizer, launch)


class Engine:
    """Every process holds all tensors; gradients are summed over the processes before a step.

    Args:
        model: As `build_engine`.
        groups: As `build_engine`.
        optimizer: As `build_engine`.
        launch: As `build_engine`.
    """

    lockstep = False
    """Whether all processes must call the model together, because its parameters are sharded."""
    skipped = False
    """Whether the loss scaler left the last step out, because the scaled gradient overflowed."""

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
        """How the optimizer's state is held: `whole` in every process, or sharded."""
        return "whole"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, for a backward pass."""
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside this block every process may call the model alone, without gradients."""
        yield

    def zero_grad(self) -> None:
        """Clear the gradients, before a step's first backward pass."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a part of the step's loss.

        Args:
            loss: The part (). All parts, over all processes, add up to the step's loss.
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
            NonFiniteError: A gradient is NaN or infinite, and no loss scale is to blame; nothing
                was updated.
        """
        self._sum()
        scale = self.scaler.get_scale()  # 1 if there is no scaler
        self.scaler.unscale_(self.optimizer)
        if scale <= OWN_SCALE:  # above, the scaler skips such steps while it searches its scale
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
        """Sum the gradients over the processes, a group at a time; a missing gradient is zero."""
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
        """Weights and optimizer state for a checkpoint; only what this process has to write."""
        optimizer, plain = optimizer_share(self.optimizer)
        tensors = {"trainable": ckpt.trainable_tensors(self.model), "optimizer": optimizer}
        if not machine.is_main():
            tensors = {}
        return tensors, {"optimizer": plain, "scaler": self.scaler.state_dict()}

    def load(self, source: Any, state: dict) -> None:
        """Load a checkpoint.

        Args:
            source: The checkpoint.
            state: Its JSON state.

        Raises:
            InputError: It does not fit the model.
        """
        ckpt.load_trainable(self.model, ckpt.load_tensors(source, "trainable"), source)
        ckpt.load_optimizer(
            self.optimizer, ckpt.load_tensors(source, "optimizer"), state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])


class ZeroEngine(Engine):
    """DeepSpeed's ZeRO with a step of our own: groups are clipped apart, after several backwards.

    DeepSpeed's boundary of gradient accumulation is set at the last backward pass only, so that one
    optimizer step follows any number of passes through any adapter.

    Args:
        model: As `build_engine`.
        groups: As `build_engine`.
        optimizer: As `build_engine`.
        launch: As `build_engine`.
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
        self.scaler = torch.amp.GradScaler(enabled=False)  # DeepSpeed has its own
        self.name = launch.engine
        return settings.check_engine(self.engine, launch)

    @property
    def sharing(self) -> str:
        """As `Engine.sharing`."""
        return f"by {self.name} in {machine.world_size()} processes"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `Engine.__call__`."""
        return self.engine(*args, **kwargs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Gather ZeRO-3's parameters and remove its hooks inside this block."""
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
        """As `Engine.zero_grad`."""
        self.engine.zero_grad()
        if self.lockstep:
            # In a step's first backward pass ZeRO-3 overwrites gradients, later it adds to them. So
            # the second adapter's gradient would be added to that of the previous step.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """As `Engine.backward`, times the processes: DeepSpeed takes their mean, not the sum.

        Args:
            loss: As `Engine.backward`.
            last: As `Engine.backward`.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * machine.world_size())

    def step(self, max_norm: float, number: int, row_ids: Sequence[str]) -> dict[str, float]:
        """As `Engine.step`.

        Args:
            max_norm: As `Engine.step`.
            number: As `Engine.step`.
            row_ids: As `Engine.step`.

        Returns:
            Norm of each group's gradient before clipping.

        Raises:
            NonFiniteError: A gradient is NaN or infinite; nothing was updated.
        """
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        norms, loss_scale = {}, self.engine.optimizer.loss_scale  # 1 except in fp16
        for name, parameters in self.groups.items():
            squares = 0.0
            for parameter in parameters:
                gradient = safe_get_full_grad(parameter)
                if gradient is not None:
                    squares += gradient.float().square().sum().item()
            norms[name] = math.sqrt(squares) / loss_scale if math.isfinite(squares) else squares
            scale = max_norm / (norms[name] + 1e-6)  # as torch's clip_grad_norm_
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
        """As `Engine.tensors`."""
        trained = ckpt.trainable_tensors(self.model)
        optimizer, plain = optimizer_share(self.engine.optimizer)
        tensors = {"optimizer": optimizer} | ({"trainable": trained} if machine.is_main() else {})
        return tensors, {"optimizer": plain, "scaler": {}}

    def load(self, source: Any, state: dict) -> None:
        """As `Engine.load`; the weights are restored from the optimizer's master weights."""
        share = ckpt.load_tensors(source, "optimizer", machine.rank())
        load_optimizer_share(self.engine.optimizer, share, state["optimizer"])
