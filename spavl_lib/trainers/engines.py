"""What a hand-written training loop does alike in one process and in several.

One loop, three engines: a process holds everything (alone, or in step with others that hold the
same), or DeepSpeed shares out optimizer state and gradients (ZeRO-2) and parameters too (ZeRO-3).
A loop that goes through this takes the same optimizer steps under each.
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
from spavl_lib.distributed import group, zero_parameters
from spavl_lib.errors import NonFiniteError
from spavl_lib.modelling.load import compute_dtype
from spavl_lib.runs.files import read_json
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.guards import gate_gradients
from spavl_lib.trainers.zero_state import load_optimizer_share, optimizer_share

Groups = dict[str, list[nn.Parameter]]


def build_engine(
    model: nn.Module, groups: Groups, optimizer: torch.optim.Optimizer, launch: LaunchConfig
) -> "Engine":
    """The engine that was asked for.

    Args:
        model: Every parameter that is used, trained or not.
        groups: The parameters that are clipped together, by name.
        optimizer: Over the groups, in this order.
        launch: Which engine, in how many processes.

    Raises:
        RuntimeError: Another number of processes runs than was asked for.
    """
    kind = Engine if launch.engine == "ddp" else ZeroEngine
    return kind(model, groups, optimizer, launch)


class Engine:
    """Every process holds everything; gradients are summed over the processes before a step."""

    lockstep = False
    """Whether a forward is a matter of all processes: parameters come in pieces."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        optimizer: torch.optim.Optimizer,
        launch: LaunchConfig,
    ):
        self.model, self.groups, self.optimizer = model, groups, optimizer
        self.scaler = torch.amp.GradScaler(enabled=compute_dtype() == torch.float16)
        self.engine_found = self._start(launch)

    def _start(self, launch: LaunchConfig) -> dict[str, Any]:
        group = torch.distributed
        size = group.get_world_size() if group.is_initialized() else 1
        if not size == machine.world_size() == launch.num_processes:
            raise RuntimeError(
                f"asked for {launch.num_processes} processes, got {size}: a trainer of several is "
                "made by `launch.train`, which starts them"
            )
        return {"engine": "ddp" if size > 1 else "none", "world_size": size}

    @property
    def sharing(self) -> str:
        """How the optimizer's state is held: whole in every process, or in shares."""
        return "whole"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, for a backward pass."""
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within it every process may call the model by itself, without gradients."""
        yield

    def zero_grad(self) -> None:
        """Before a step's first backward pass."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this process's share of a step's loss.

        Args:
            loss: Summed over shares and processes it is the step's.
            last: Whether the step's last one.
        """
        self.scaler.scale(loss).backward()

    def step(self, max_norm: float, number: int, row_ids: Sequence[str]) -> dict[str, float]:
        """Check, clip and apply the gradients.

        Args:
            max_norm: Of each group's gradient.
            number: The step, for messages.
            row_ids: Its rows, for messages.

        Returns:
            Each group's norm before clipping.

        Raises:
            NonFiniteError: A gradient is no number; nothing was updated.
        """
        self._sum()
        self.scaler.unscale_(self.optimizer)
        if not self.scaler.is_enabled():  # one that looks for its scale skips such steps itself
            gate_gradients(self.model, number, list(row_ids))
        norms = {
            name: torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
            for name, parameters in self.groups.items()
        }
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norms

    def _sum(self) -> None:
        """Over the processes, one tensor a group; where a process has none, it is zero."""
        if machine.world_size() == 1:
            return
        for parameters in self.groups.values():
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            total = group.sum_of(torch.cat([part.reshape(-1) for part in parts]))
            for parameter, part in zip(
                parameters, total.split([p.numel() for p in parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter).to(parameter.dtype, copy=True)

    # --- checkpoints --------------------------------------------------------------------------

    def tensors(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """What a checkpoint holds of weights and optimizer; of this process, where shared out."""
        optimizer, plain = optimizer_share(self.optimizer)
        tensors = {"trainable": ckpt.trainable_tensors(self.model), "optimizer": optimizer}
        if not machine.is_main():
            tensors = {}
        return tensors, {"optimizer": plain, "scaler": self.scaler.state_dict()}

    def load(self, source: Any, state: dict) -> None:
        """The inverse of `tensors`, strictly.

        Raises:
            InputError: Another model's.
        """
        ckpt.load_trainable(self.model, ckpt.load_tensors(source, "trainable"), source)
        ckpt.load_optimizer(
            self.optimizer, ckpt.load_tensors(source, "optimizer"), state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])


class ZeroEngine(Engine):
    """DeepSpeed's ZeRO, with a step of our own: two groups clipped apart, several backward passes.

    The boundary of accumulation is set false for all passes but the last, so that one step follows
    however many forwards and backwards, of whichever adapter.
    """

    def _start(self, launch: LaunchConfig) -> dict[str, Any]:
        import deepspeed

        settings = read_json(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]))
        settings["bf16"]["enabled"] = compute_dtype() == torch.bfloat16
        settings["fp16"]["enabled"] = compute_dtype() == torch.float16
        settings |= {
            "gradient_clipping": 0.0,  # by group, in `step`
            "gradient_accumulation_steps": 1,
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": launch.num_processes,
        }
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=settings
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
        """ZeRO-3's parameters gathered, and its hooks off: processes go their own ways."""
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
            # ZeRO-3 overwrites its gradients in a step's first backward pass and adds in later
            # ones: an adapter that comes second would be added to its gradient of the last step.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """As `Engine.backward`; DeepSpeed takes the mean over processes, not the sum."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * machine.world_size())

    def step(self, max_norm: float, number: int, row_ids: Sequence[str]) -> dict[str, float]:
        """As `Engine.step`."""
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        norms, scaled = {}, self.engine.optimizer.loss_scale  # 1 but in fp16
        for name, parameters in self.groups.items():
            squares = 0.0
            for parameter in parameters:
                gradient = safe_get_full_grad(parameter)
                if gradient is not None:
                    squares += gradient.float().square().sum().item()
            norms[name] = math.sqrt(squares) / scaled if math.isfinite(squares) else squares
            scale = max_norm / (norms[name] + 1e-6)  # as torch's clip_grad_norm_
            if scale < 1:
                for parameter in parameters:
                    gradient = safe_get_full_grad(parameter)
                    if gradient is not None:
                        safe_set_full_grad(parameter, gradient * scale)
        if not all(map(math.isfinite, norms.values())) and not self.engine.fp16_enabled():
            raise NonFiniteError(
                f"step {number}: the gradient is not finite on rows {', '.join(row_ids)}; "
                "nothing was updated, the last checkpoint stands"
            )
        self.engine.step()
        return norms

    def tensors(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """As `Engine.tensors`."""
        trained = ckpt.trainable_tensors(self.model)
        optimizer, plain = optimizer_share(self.engine.optimizer)
        tensors = {"optimizer": optimizer} | ({"trainable": trained} if machine.is_main() else {})
        return tensors, {"optimizer": plain, "scaler": {}}

    def load(self, source: Any, state: dict) -> None:
        """As `Engine.load`; the weights come back through the optimizer's masters."""
        share = ckpt.load_tensors(source, "optimizer", machine.rank())
        load_optimizer_share(self.engine.optimizer, share, state["optimizer"])
