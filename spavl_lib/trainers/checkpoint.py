"""Write and read checkpoints, for every trainer.

A checkpoint is a folder `step-N` that holds safetensors and JSON files, never pickles. The files
are first written into a folder with a temporary name and flushed to disk. Then a manifest with the
files' sizes and hashes is added, and the folder is renamed. A folder `step-N` is therefore complete
when it appears, and the manifest reveals any later damage.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spavl_lib import machine
from spavl_lib.distributed import group, zero_parameters
from spavl_lib.errors import DiskError, InputError
from spavl_lib.runs.files import existing_parent, sha256_file, writing
from spavl_lib.runs.provenance import canonical_sha256

MANIFEST = "MANIFEST.json"


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Compute a hex digest over the sorted (name, dtype, shape, bytes) of tensors.

    Two sets of weights are equal if their digests are equal.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict,
    *,
    keep: int = 2,
    texts: dict[str, str] | None = None,
) -> Path:
    """Write the checkpoint `folder/step-N`, then remove older checkpoints.

    No incomplete `step-N` is left after an error. All processes must call this together. The main
    process writes all of its arguments; the others write their `tensors` and `state` into files
    whose names contain their rank.

    Args:
        folder: The stage's `checkpoints/`.
        step: Number of the last finished step.
        tensors: Tensors to write, as file stem -> name -> tensor.
        state: JSON values, which are written into `state.json`.
        keep: Number of checkpoints to keep, including this one.
        texts: Further text files, as file name -> content.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: The disk is full, or there is no permission to write. Earlier checkpoints are
            untouched.
    """
    temporary, target = folder / f".tmp-step-{step}", folder / f"step-{step}"
    needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
    main, files = machine.is_main(), {**(texts or {}), "state.json": json.dumps(state)}
    with writing(target, needed):
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        group.barrier()
        if not main:
            _write_files(temporary, tensors, {"state.json": files["state.json"]}, machine.rank())
        group.barrier()
        if main:
            _write_whole(temporary, target, step, tensors, files)
        group.barrier()
    for old in _steps(folder)[keep:] if main else ():
        shutil.rmtree(old)
    return target


def _rank_name(name: str, rank: int) -> str:
    """Return the name of a rank's file. Rank 3 writes `optimizer.rank-0003.safetensors`.

    Rank 0 writes `optimizer.safetensors`.
    """
    stem, _, suffix = name.rpartition(".")
    return name if rank == 0 else f"{stem}.rank-{rank:04d}.{suffix}"


def _alone(value: Tensor) -> Tensor:
    """Return `value` itself if it fills its storage, or a copy if it is a view of a larger one."""
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


def _write_files(
    temporary: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str], rank: int
) -> None:
    written = []
    for stem, named in tensors.items():
        copies = {k: _alone(v.detach().cpu().contiguous()) for k, v in named.items()}
        written.append(temporary / _rank_name(f"{stem}.safetensors", rank))
        save_file(copies, written[-1])
        del copies
    for name, text in texts.items():
        written.append(temporary / _rank_name(name, rank))
        written[-1].write_text(text, encoding="utf-8")
    for path in written:
        _sync(path)


def _write_whole(
    temporary: Path,
    target: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    texts: dict[str, str],
) -> None:
    try:
        _write_files(temporary, tensors, texts, 0)
        files = {
            p.name: {"size": p.stat().st_size, "sha256": sha256_file(p)}
            for p in sorted(temporary.iterdir())
        }
        manifest = {"step": step, "files": files, "sealed": canonical_sha256([step, files])}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_room(folder: Path, model: torch.nn.Module, *, keep: int = 2) -> None:
    """Raise before the first step if the disk has no room for the checkpoints.

    Args:
        folder: The stage's `checkpoints/`. Space of existing checkpoints counts as free, because
            new checkpoints replace them.
        model: The model. For each trainable value a checkpoint also holds the optimizer's two fp32
            moments (8 bytes).
        keep: Number of checkpoints that are kept. One more is written before the oldest is removed.

    Raises:
        DiskError: There is too little room. The message says how many bytes are needed and how many
            are free.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    one = sum(zero_parameters.numel(p) * (p.element_size() + 8) for p in trained) + 2**16
    present = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    needed = max(0, (keep + 1) * one - present)
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed:
        raise DiskError(
            f"{folder}: {needed:,} bytes needed for {keep} checkpoints and one being written, "
            f"{free:,} bytes free; make room, or set SPAVL_RUNS to a larger disk"
        )


def _steps(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, newest first."""
    checkpoints = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(checkpoints, key=lambda p: -int(p.name[5:]))


def problem_with(checkpoint: Path) -> str | None:
    """Name the first bad file of a checkpoint and its fault; None if the checkpoint is complete."""
    torn = f"{checkpoint / MANIFEST} is missing or torn"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {n: (seal["size"], seal["sha256"]) for n, seal in manifest["files"].items()}
        whole = manifest["sealed"] == canonical_sha256([manifest["step"], manifest["files"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return torn
    if not whole or manifest["step"] != int(checkpoint.name[5:]) or "state.json" not in files:
        return torn
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or sha256_file(path) != digest:
            return f"{path} does not match its hash"
    return None


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint, or None.

    The second result describes the fault of each newer checkpoint, all of which are damaged.
    """
    skipped: list[str] = []
    for checkpoint in _steps(folder):
        problem = problem_with(checkpoint)
        if problem is None:
            return checkpoint, skipped
        skipped.append(problem)
    return None, skipped


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint, or None. Warn of newer checkpoints that are damaged."""
    newest, problems = latest_checkpoint(folder)
    for problem in problems:
        warnings.warn(f"{problem}: using an older checkpoint", stacklevel=2)
    return newest


def load_tensors(checkpoint: Path, stem: str, rank: int = 0) -> dict[str, Tensor]:
    """Load a tensor file of a checkpoint.

    Args:
        checkpoint: Folder of the checkpoint.
        stem: Name of the file without its ending, such as `trainable`.
        rank: Rank of the process that wrote the file.
    """
    return load_file(checkpoint / _rank_name(f"{stem}.safetensors", rank))


def load_state(checkpoint: Path, rank: int = 0) -> dict:
    """Load the JSON state that process `rank` wrote; empty if that process wrote no state."""
    path = checkpoint / _rank_name("state.json", rank)
    if rank and not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def check_sharing(checkpoint: Path, stored: str, now: str) -> None:
    """Check that a checkpoint's optimizer state is divided among processes as this run needs it.

    Shards of ZeRO fit only the same engine in the same number of processes.

    Args:
        checkpoint: The checkpoint, for the message.
        stored: How the processes that wrote the checkpoint held the optimizer state: "whole", or
            for example "by zero2 in 2 processes".
        now: How this run's processes hold the optimizer state, in the same form.

    Raises:
        InputError: `stored` and `now` differ.
    """
    if stored != now:
        raise InputError(
            f"{checkpoint} holds the optimizer state {stored}, but this run holds it {now}; use "
            "the launch settings that the run started with, or delete the checkpoints"
        )


# --- contents of a checkpoint -------------------------------------------------------------------


def trainable_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name.

    Under ZeRO-3 only the main process gets the whole tensors; the other processes get none.
    """
    return zero_parameters.whole({n: p for n, p in model.named_parameters() if p.requires_grad})


def load_trainable(model: torch.nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Load every trainable parameter of a model.

    Args:
        model: The model to load into.
        tensors: Tensors by parameter name.
        source: The checkpoint, for the message.

    Raises:
        InputError: A name is missing or unexpected, or a shape differs.
    """
    current = trainable_tensors(model)
    missing = sorted(current.keys() - tensors.keys())
    extra = sorted(tensors.keys() - current.keys())
    shapes = [k for k in current.keys() & tensors.keys() if current[k].shape != tensors[k].shape]
    if missing or extra or shapes:
        raise InputError(
            f"{source} does not fit the model: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unexpected {extra[:3]}, {len(shapes)} of another shape {shapes[:3]}; "
            "use another run_name, or delete the checkpoints"
        )
    with torch.no_grad():
        for name, value in current.items():
            value.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """Divide an optimizer's state into named tensors and JSON values, which need no pickle."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, slots in state["state"].items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, {"slots": plain, "param_groups": state["param_groups"]}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict
) -> None:
    """Load an optimizer's state.

    Args:
        optimizer: The optimizer to load into.
        tensors: Tensors of `optimizer_tensors`.
        plain: JSON values of `optimizer_tensors`.
    """
    slots: dict[int, dict] = {}
    for name, value in [*tensors.items(), *plain["slots"].items()]:
        index, key = name.split(".", 1)
        slots.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": slots, "param_groups": plain["param_groups"]})


def rng_state() -> tuple[dict[str, Tensor], dict]:
    """Return the states of torch's, CUDA's, numpy's and Python's random generators.

    Returns:
        The states as tensors, and the rest of each state as JSON values.
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - global state
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    version, internal, gauss = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    return tensors, {
        "numpy": [name, position, has_gauss, cached],
        "python": [version, gauss],
    }


def restore_rng(checkpoint: Path) -> None:
    """Restore this process's random generators.

    If fewer processes wrote the checkpoint, some of this run's processes have no saved state. The
    generators of these processes are not changed.
    """
    if state := load_state(checkpoint, machine.rank()):
        load_rng(load_tensors(checkpoint, "rng", machine.rank()), state["rng"])


def load_rng(tensors: dict[str, Tensor], plain: dict) -> None:
    """Restore the random generators from the result of `rng_state`."""
    torch.set_rng_state(tensors["torch"])
    cuda = [v for k, v in sorted(tensors.items()) if k.startswith("cuda.")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    name, position, has_gauss, cached = plain["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002
    version, gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


@contextlib.contextmanager
def keeping_settings(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Keep this run's learning rates and weight decay while a checkpoint is loaded in this context.

    Loading overwrites both settings with the checkpoint's values. At its end the context restores
    this run's values, so a setting that was changed before a run resumes takes effect.

    Args:
        optimizer: The optimizer whose state is loaded. It has this run's settings.
        scheduler: The optimizer's learning-rate scheduler. It has this run's settings.
    """
    rates = list(scheduler.base_lrs)
    decays = [parameters["weight_decay"] for parameters in optimizer.param_groups]
    yield
    if rates != scheduler.base_lrs:
        scheduler.base_lrs = rates
        scheduler._last_lr = scheduler.get_lr()
        current = scheduler.get_last_lr()
        for parameters, peak, rate in zip(optimizer.param_groups, rates, current, strict=True):
            parameters["initial_lr"], parameters["lr"] = peak, rate
    for parameters, decay in zip(optimizer.param_groups, decays, strict=True):
        parameters["weight_decay"] = decay
