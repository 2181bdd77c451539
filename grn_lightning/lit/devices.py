"""Devices, at hand or not: their memory and rates, as data sheets have them or as measured."""

import os
import time
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """What a data sheet says of a device; rates are those of dense products."""

    name: str
    """As people call it."""
    memory: float
    """Bytes that a program finds."""
    bf16: float
    """Operations per second in bfloat16 with float32 sums."""
    tf32: float
    """The same in TF32, which convolutions of a float32 tokenizer take."""
    fp32: float
    """The same in float32."""
    reserve: float = 1.0 * 2**30
    """Bytes that driver, libraries and communication take before the first tensor."""
    fragmentation: float = 0.05
    """Share of the memory that an allocator cannot put to use."""

    @property
    def usable(self) -> float:
        """Bytes that tensors can have."""
        return max(0.0, self.memory * (1 - self.fragmentation) - self.reserve)


_T, _GIB = 1e12, 2.0**30

# Data sheets of NVIDIA (SXM modules where there are several), without sparsity; the memory is what
# the driver reports.
DEVICES: dict[str, Device] = {
    "H100": Device("H100", 79.6 * _GIB, 989 * _T, 495 * _T, 67 * _T),
    "H200": Device("H200", 140.4 * _GIB, 989 * _T, 495 * _T, 67 * _T),
    "A100": Device("A100", 79.3 * _GIB, 312 * _T, 156 * _T, 19.5 * _T),
    "A100-40": Device("A100-40", 39.4 * _GIB, 312 * _T, 156 * _T, 19.5 * _T),
    "L40S": Device("L40S", 44.5 * _GIB, 362 * _T, 183 * _T, 91.6 * _T),
    "4090": Device("4090", 23.6 * _GIB, 165 * _T, 82.6 * _T, 82.6 * _T),
}


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def product_rate(dtype: torch.dtype, *, size: int = 768, seconds: float = 0.2) -> float:
    """Return the operations per second of this CPU in matrix products.

    Args:
        dtype: Of the matrices.
        size: Rows and columns.
        seconds: How long to measure.
    """
    a = torch.rand(size, size).to(dtype)
    a @ a
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        count += 1
    return count * 2.0 * size**3 / (time.perf_counter() - start)


def find_device(name: str) -> Device:
    """Return a device of the table, or this machine's CPU with rates that are measured.

    Raises:
        ValueError: If it is not in the table.
    """
    if name.lower() == "cpu":
        fp32 = product_rate(torch.float32)
        bf16 = product_rate(torch.bfloat16)
        return Device("CPU", _host_memory(), bf16, fp32, fp32, reserve=0.5 * _GIB)
    for known, device in DEVICES.items():
        if name.lower() == known.lower():
            return device
    raise ValueError(
        f"unknown device {name!r}; known are {', '.join(DEVICES)} and cpu. Describe another one by "
        "the nearest of them with `--memory` (GiB) and `--tflops`."
    )


def peak_rate(device: torch.device, precision: str) -> float | None:
    """Return the operations per second that the data sheet of a device promises.

    Args:
        device: Where the training runs.
        precision: As `trainer.precision` says it.

    Returns:
        None if the device is not in the table; a CPU never is.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((one for key, one in DEVICES.items() if key.partition("-")[0] in name), None)
    if known is None:
        return None
    return known.bf16 if "16" in str(precision) else known.fp32


def described(device: Device, *, memory: float | None, tflops: float | None) -> Device:
    """Change memory (GiB) and rate (in 10^12 operations per second) of a device."""
    if memory is not None:
        device = replace(device, memory=memory * _GIB)
    if tflops is not None:
        rate = tflops * _T
        device = replace(device, bf16=rate, tf32=min(rate, device.tf32), fp32=rate)
    return device
