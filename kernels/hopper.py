"""The backend `hopper`: what has a kernel for sm_90a. Imported when it first runs."""

from __future__ import annotations

from dsv4lab.kernels.quantize_family import IMPLEMENTATIONS
from dsv4lab.ops import OPS, register_implementation

for _name, _out in IMPLEMENTATIONS.items():
    if _name in OPS:
        register_implementation(_name, "hopper", out=_out)
