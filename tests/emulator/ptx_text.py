"""PTX kernels written by hand, for tests of single instructions."""

from __future__ import annotations

REGISTERS = """
 .reg .pred %p<20>; .reg .b16 %rs<40>; .reg .b32 %r<300>; .reg .b64 %rd<60>; .reg .b128 %rq<4>;
 .reg .f32 %f<40>; .reg .f64 %fd<10>;
"""


def kernel(body: str, parameters: str = ".u64 x, .u64 y", target: str = "sm_100a", before: str = "") -> str:
    """A module with the one kernel `k`; its parameters x and y are in %rd1 and %rd2, %tid.x in %r1.

    `%rd3` is %tid.x times 4, and `smem` the dynamic shared memory.
    """
    declared = ", ".join(f".param {p.strip()}" for p in parameters.split(",") if p.strip())
    loads = "\n".join(
        f" ld.param.u64 %rd{i + 1}, [{p.split()[-1]}];"
        for i, p in enumerate(parameters.split(","))
        if ".u64" in p
    )
    return f"""
.version 8.8
.target {target}
.address_size 64
.extern .shared .align 16 .b8 smem[];
{before}
.visible .entry k({declared})
{{
{REGISTERS}
{loads}
 mov.u32 %r1, %tid.x;
 mul.wide.u32 %rd3, %r1, 4;
{body}
 ret;
}}
"""
