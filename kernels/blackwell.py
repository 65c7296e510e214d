"""The backend "blackwell": imported when it is first to run, says which kernels it has."""

from __future__ import annotations

from dsv4lab.kernels import gemm, quantize_family

import dsv4lab.gemm
import dsv4lab.layouts
import dsv4lab.quantize  # noqa: F401 (who runs one operation may not have imported, and so registered, the others)
from dsv4lab.ops import register_implementation

for name, out in gemm.IMPLEMENTATIONS.items():
    register_implementation(name, "blackwell", out=out, refuses=gemm.refuses)
for name, out in quantize_family.IMPLEMENTATIONS.items():
    register_implementation(name, "blackwell", out=out)
