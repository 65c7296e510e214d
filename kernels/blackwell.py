"""The backend "blackwell": imported when it is first to run, says which kernels it has."""

from __future__ import annotations

from dsv4lab.kernels import gemm, quantize_family

from dsv4lab.ops import register_implementation

for name, out in {**gemm.IMPLEMENTATIONS, **quantize_family.IMPLEMENTATIONS}.items():
    register_implementation(name, "blackwell", out=out)
