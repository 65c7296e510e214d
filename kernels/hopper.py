"""The backend `hopper`: what has a kernel for sm_90a. Imported when it first runs."""

from __future__ import annotations

from dsv4lab.kernels import hopper_gemm, quantize_family

import dsv4lab.gemm
import dsv4lab.layouts
import dsv4lab.quantize  # noqa: F401 (who runs one operation may not have imported, and so registered, the others)
from dsv4lab.ops import register_implementation

for _name, _out in hopper_gemm.IMPLEMENTATIONS.items():
    register_implementation(_name, "hopper", out=_out, refuses=hopper_gemm.refuses)
for _name, _out in quantize_family.IMPLEMENTATIONS.items():
    register_implementation(_name, "hopper", out=_out)
