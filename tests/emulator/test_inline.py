"""Calls of device functions."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.emulator import EmulatorError, device

FUNCTIONS = """
.func (.param .b32 result) twice(.param .b32 value)
{
 .reg .b32 %r<4>; .reg .pred %p<2>;
 ld.param.b32 %r1, [value];
 setp.gt.s32 %p1, %r1, 20;
 @%p1 bra LARGE;
 add.s32 %r2, %r1, %r1;
 st.param.b32 [result], %r2;
 ret;
LARGE:
 st.param.b32 [result], -1;
 ret;
}
.func (.param .b32 result) sum(.param .b32 a, .param .b32 b)
{
 .reg .b32 %r<4>;
 .param .b32 t; .param .b32 u;
 ld.param.b32 %r1, [a];
 st.param.b32 [t], %r1;
 call (u), twice, (t);
 ld.param.b32 %r2, [u];
 ld.param.b32 %r1, [b];
 add.s32 %r3, %r1, %r2;
 st.param.b32 [result], %r3;
 ret;
}
.func again()
{
 call again;
 ret;
}
"""


def run(text):
    gpu = device("sm_100a")
    y = gpu.from_torch(torch.full((32,), 5, dtype=torch.int32))
    gpu.run_ptx(text, y, y)
    return y.tolist()


def test_functions_call_functions(ptx_kernel):
    """In a loop, so that branches of the kernel go round the bodies put into it."""
    body = """
 .param .b32 p; .param .b32 q; .param .b32 r;
 mov.u32 %r8, 0; mov.u32 %r9, 0;
LOOP:
 st.param.b32 [p], %r1; st.param.b32 [q], %r9;
 call (r), sum, (p, q);
 ld.param.b32 %r9, [r];
 add.s32 %r8, %r8, 1;
 setp.lt.s32 %p1, %r8, 3;
 @%p1 bra LOOP;
 add.s64 %rd10, %rd2, %rd3; st.global.b32 [%rd10], %r9;
"""
    expected = [3 * (2 * t if t <= 20 else -1) for t in range(32)]
    assert run(ptx_kernel(body, before=FUNCTIONS)) == expected


def test_a_guarded_call_is_made_by_some_lanes(ptx_kernel):
    body = """
 .param .b32 p; .param .b32 r;
 st.param.b32 [p], %r1; st.param.b32 [r], 99;
 setp.lt.u32 %p1, %r1, 4;
 @!%p1 call (r), twice, (p);
 ld.param.b32 %r9, [r];
 add.s64 %rd10, %rd2, %rd3; st.global.b32 [%rd10], %r9;
"""
    expected = [99 if t < 4 else 2 * t if t <= 20 else -1 for t in range(32)]
    assert run(ptx_kernel(body, before=FUNCTIONS)) == expected


def test_recursion_is_refused(ptx_kernel):
    with pytest.raises(EmulatorError, match=r"again calls itself.*PTX line"):
        run(ptx_kernel(" call again;", before=FUNCTIONS))
