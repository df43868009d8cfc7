"""Describe this machine, the profiles that it can run, and packages that differ from the pins."""

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
import tomllib

import torch

from spavl_lib import machine
from spavl_lib.config import load_config
from spavl_lib.distributed.settings import local_processes
from spavl_lib.machine import GIB
from spavl_lib.runs.files import existing_parent
from spavl_lib.runs.paths import repo_root, runs_root

# For each shipped profile the needed main memory, and the needed memory of one CUDA GPU, in GiB. 0
# means that no GPU is needed.
NEEDS = {
    "smoke": (2, 0), "demo": (4, 0), "laptop": (6, 0), "laptop-hub": (8, 8), "colab": (8, 16),
    "full": (32, 80),
}  # fmt: skip
# Machines and GPUs report a little less memory than their nominal size, so this share of the needed
# memory is enough.
REPORTED_SHARE = 0.9


def describe_machine() -> dict[str, str]:
    """Python, torch, devices, memory, cores and disk, one line each."""
    devices = [f"{name} ({memory / GIB:.0f} GiB)" for name, memory in machine.gpus()]
    free = shutil.disk_usage(existing_parent(runs_root())).free
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "devices": ", ".join(devices) or "cpu only",
        "cores": str(machine.cores()),
        "memory": f"{machine.memory_bytes() / GIB:.1f} GiB",
        "disk": f"{free / GIB:.1f} GiB free under {runs_root()}",
    }


def read_pins() -> dict[str, str]:
    """Package -> pinned version, from the checkout's files or from the installed package.

    The installed package does not pin packages that hosted notebooks bring, such as torch.
    """
    project, constraints = (repo_root() / n for n in ("pyproject.toml", "constraints.txt"))
    if project.is_file():
        page = tomllib.loads(project.read_text(encoding="utf-8"))
        lines = page.get("project", {}).get("dependencies", [])
        if constraints.is_file():
            lines += constraints.read_text(encoding="utf-8").splitlines()
    else:
        try:
            lines = importlib.metadata.requires("spavl-workbook") or []
        except importlib.metadata.PackageNotFoundError:
            lines = []
    lines = [line for line in lines if "extra ==" not in line]
    return dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line)


def differing_pins(pins: dict[str, str]) -> list[str]:
    """A line for each package that is missing or whose version differs from its pin.

    Args:
        pins: Package -> version. A local version part, as in 2.13.0+cpu, is ignored.
    """
    lines = []
    for name, pinned in sorted(pins.items()):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: {pinned} pinned, missing")
            continue
        if installed.split("+")[0] != pinned:
            lines.append(f"{name}: {pinned} pinned, {installed} installed")
    return lines


def describe_pins() -> tuple[str, list[str]]:
    """How many installed packages differ from the pins, and a line for each of them."""
    pins = read_pins()
    differing = differing_pins(pins)
    if not pins:
        return "unknown: neither a checkout nor the installed package was found", []
    count = f"{len(differing)} of {len(pins)} differ" if differing else f"all {len(pins)} as pinned"
    return count, differing


def cannot_run(profile: str) -> list[str]:
    """Reasons why this machine cannot run a shipped profile; empty if none is known."""
    config, (memory, gpu) = load_config(profile), NEEDS[profile]
    reasons = []
    available = machine.memory_bytes()
    if available < REPORTED_SHARE * memory * GIB:
        reasons.append(f"needs {memory} GiB of memory, this machine has {available / GIB:.1f}")
    largest = max((size for _, size in machine.gpus()), default=0)
    if gpu and largest < REPORTED_SHARE * gpu * GIB:
        present = (
            f"the largest here has {largest / GIB:.0f}" if largest else "this machine has none"
        )
        reasons.append(f"needs a CUDA GPU of {gpu} GiB, {present}")
    if shutil.disk_usage(existing_parent(runs_root())).free < GIB:
        reasons.append(f"needs 1 GiB of disk under {runs_root()}")
    if config.model.adapter == "qlora" and not importlib.util.find_spec("bitsandbytes"):
        reasons.append("needs bitsandbytes")
    return reasons


def engines() -> dict[str, str]:
    """The number of processes, the optional engines and the 16-bit type of this machine."""

    def installed(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    processes = "one per GPU" if machine.gpus() else "one per core, to try it out"
    missing = "not installed: pip install -e '.[deepspeed]'"
    return {
        "processes": f"up to {local_processes()} on this machine ({processes})",
        "zero2/3": "yes" if installed("deepspeed") else missing,
        "4 bit": "yes" if installed("bitsandbytes") else "no: bitsandbytes is not installed",
        "16 bit": half_precision(),
        "vllm": "yes" if installed("vllm") else "not installed; transformers generates responses",
    }


def half_precision() -> str:
    """The 16-bit type that training would use on this machine."""
    name = machine.dtype_name()
    if not machine.gpus() and name == "fp32":
        return "no: fp32 on the CPU"
    return name
