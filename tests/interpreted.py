"""Run in a process of its own with TRITON_INTERPRET=1: the kernels of ψ on a CPU, one number after another."""

import json
import sys

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from bypass_fx import fused, triton_psi


@triton.jit
def _exp(x):  # type: ignore[no-untyped-def]
    return tl.exp(x)


@triton.jit
def _erf(x):  # type: ignore[no-untyped-def]
    return tl.erf(x)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


KERNELS = (
    ("relu", 0.0, 0.0), ("leaky_relu", 0.1, 0.0), ("hardtanh", 0.0, 6.0), ("silu", 0.0, 0.0), ("gelu", 0.0, 0.0),
    ("gelu_tanh", 0.0, 0.0),
)  # fmt: skip


def main() -> None:
    """Print, for each kernel and type, whether forward and backward agree with torch's."""
    libdevice.exp, libdevice.erf, libdevice.tanh = _exp, _erf, _tanh  # the interpreter has none of a GPU's library
    if "few" in sys.argv:  # programs, so that each has several tiles
        triton_psi.BACKWARD = triton_psi.BACKWARD._replace(programs=4)
    found = {}
    for kernel in KERNELS:
        for dtype in (torch.float32, torch.float16):
            found[f"{kernel[0]} {dtype}"] = fused.agreement(kernel, dtype, torch.device("cpu"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
