"""Whether this machine can run a profile, and how its packages differ from the pins."""

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
import tomllib

from spavl_lib.config import load_config
from spavl_lib.distributed.settings import local_processes
from spavl_lib.machine import GIB, cores, gpus, memory_bytes
from spavl_lib.modelling.load import compute_dtype
from spavl_lib.runs.files import existing_parent
from spavl_lib.runs.paths import repo_root, runs_root

# What a shipped profile is made for: memory of the machine, and of one CUDA GPU, in GiB.
NEEDS = {"smoke": (2, 0), "demo": (4, 0), "colab": (8, 16), "full": (32, 80)}


def describe_machine() -> dict[str, str]:
    """Python, torch, devices, memory, cores and disk, a line each."""
    import torch

    devices = [f"{name} ({memory / GIB:.0f} GiB)" for name, memory in gpus()]
    free = shutil.disk_usage(existing_parent(runs_root())).free
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "devices": ", ".join(devices) or "cpu only",
        "cores": str(cores()),
        "memory": f"{memory_bytes() / GIB:.1f} GiB",
        "disk": f"{free / GIB:.1f} GiB free under {runs_root()}",
    }


def read_pins() -> dict[str, str]:
    """Package -> pinned version, from the checkout's pyproject.toml or the installed package."""
    project = repo_root() / "pyproject.toml"
    if project.is_file():
        page = tomllib.loads(project.read_text(encoding="utf-8"))
        lines = page.get("project", {}).get("dependencies", [])
    else:
        try:
            lines = importlib.metadata.requires("spavl-workbook") or []
        except importlib.metadata.PackageNotFoundError:
            lines = []
    lines = [line for line in lines if "extra ==" not in line]
    return dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line)


def differing_pins(pins: dict[str, str]) -> list[str]:
    """A line for each package that is missing or of another version than its pin.

    Args:
        pins: Package -> version. A local part, as in 2.13.0+cpu, is no difference.
    """
    lines = []
    for name, wanted in sorted(pins.items()):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: {wanted} pinned, missing")
            continue
        if found.split("+")[0] != wanted:
            lines.append(f"{name}: {wanted} pinned, {found} installed")
    return lines


def cannot_run(profile: str) -> list[str]:
    """Why this machine cannot run a shipped profile; empty if it can, as far as can be told.

    Args:
        profile: Its name.
    """
    config, (memory, gpu) = load_config(profile), NEEDS[profile]
    reasons = []
    # Machines and cards hold a little less than the number they are sold by.
    if memory_bytes() < 0.9 * memory * GIB:
        reasons.append(f"needs {memory} GiB of memory, here are {memory_bytes() / GIB:.1f}")
    largest = max((size for _, size in gpus()), default=0)
    if gpu and largest < 0.9 * gpu * GIB:
        there = f"the largest here has {largest / GIB:.0f}" if largest else "there is none here"
        reasons.append(f"needs a CUDA GPU of {gpu} GiB, {there}")
    if shutil.disk_usage(existing_parent(runs_root())).free < GIB:
        reasons.append(f"needs 1 GiB of disk under {runs_root()}")
    if config.model.adapter == "qlora" and not importlib.util.find_spec("bitsandbytes"):
        reasons.append("needs bitsandbytes")
    return reasons


def engines() -> dict[str, str]:
    """Ways of training in several processes, and of answering, and why not more."""

    def has(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    extra = "not installed: pip install -e '.[deepspeed]'"
    return {
        "processes": f"up to {local_processes()} on this machine "
        f"({'one a GPU' if gpus() else 'one a core, for trying out'})",
        "zero2/3": "yes" if has("deepspeed") else extra,
        "4 bit": "yes" if has("bitsandbytes") else "no: bitsandbytes is not installed",
        "16 bit": half_precision(),
        "vllm": "yes" if has("vllm") else "not installed; transformers answers",
    }


def half_precision() -> str:
    """The 16-bit type training would use here."""

    if not gpus():
        return "no: fp32 on the CPU"
    return str(compute_dtype()).removeprefix("torch.")
