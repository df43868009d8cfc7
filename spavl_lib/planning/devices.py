"""Memory, speed and bandwidth of the devices that the planner knows."""

import time
from dataclasses import dataclass

import torch

from spavl_lib.errors import InputError, nearest
from spavl_lib.machine import GIB, memory_bytes


@dataclass(frozen=True)
class Device:
    """One accelerator, or this machine's CPU."""

    name: str
    memory_gib: float
    """Memory that a process can allocate, in GiB. It excludes the driver and the CUDA context."""
    tflops: float
    """Peak rate of dense matrix products in the training precision, in 10^12 FLOP/s."""
    bandwidth_gbs: float
    """Memory bandwidth, in 10^9 bytes/s."""
    half: str = "bf16"
    """The device's 16-bit type; "none" on the CPU."""


# Rates and bandwidths are from NVIDIA's data sheets. Rates are dense (half of the figure with
# sparsity), with sums in fp32. If a card has several forms, the figures are those of the SXM form.
# Memory is what a process can allocate: the nominal size minus about 1 GiB for driver and CUDA
# context.
DEVICES = {
    "t4": Device("t4", 14.6, 65, 320, "fp16"),
    "l4": Device("l4", 22.0, 121, 300),
    "a10": Device("a10", 22.0, 125, 600),
    "rtx3090": Device("rtx3090", 23.0, 71, 936),
    "rtx4090": Device("rtx4090", 23.0, 165, 1008),
    "a100-40": Device("a100-40", 39.0, 312, 1555),
    "a100-80": Device("a100-80", 78.8, 312, 2039),
    "h100": Device("h100", 78.8, 989, 3350),
    "h200": Device("h200", 139.0, 989, 4800),
}
# A rough estimate for laptops. Only the estimated time of sampling depends on it.
CPU_BANDWIDTH_GBS = 20


def device_named(name: str) -> Device:
    """The device with this name. `cpu` is this machine's CPU.

    Raises:
        InputError: The name is unknown.
    """
    if name == "cpu":
        return Device("cpu", memory_bytes() / GIB, cpu_tflops(), CPU_BANDWIDTH_GBS, "none")
    if name == "mps":
        raise InputError(
            "no training uses Apple's GPU (mps): on a Mac models compute on the CPU; plan with "
            "--device cpu"
        )
    if name not in DEVICES:
        raise InputError(
            f"unknown device {name!r}{nearest(name, DEVICES)} (known: cpu, {', '.join(DEVICES)}; "
            "for another card take one of similar speed, with --memory GIB)"
        )
    return DEVICES[name]


def cpu_tflops() -> float:
    """This CPU's rate of fp32 matrix products, in 10^12 FLOP/s, measured in a tenth of a second.

    The fastest of several products counts, because other programs slow single ones down.
    """
    a = torch.randn(768, 768)
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * 768**3 / min(seconds) / 1e12
