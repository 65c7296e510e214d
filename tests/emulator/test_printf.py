"""printf and assertions of kernels."""

from __future__ import annotations

import pytest

from dsv4lab.emulator import KernelTrap, device

STRINGS = r"""
.extern .func (.param .b32 status) vprintf(.param .b64 format, .param .b64 values);
.extern .func __assertfail(
 .param .b64 message, .param .b64 file, .param .b32 line, .param .b64 function, .param .b64 size
);
.global .align 1 .b8 form[40] = {%s};
.global .align 1 .b8 word[4] = {115, 105, 120, 0};
"""


def strings(form: str) -> str:
    octets = [*form.encode(), 0]
    return STRINGS % ", ".join(map(str, octets))


CALL = """
 .local .align 8 .b8 depot[32];
 .param .b64 p0; .param .b64 p1; .param .b32 r0;
 mov.u64 %rd5, depot; cvta.local.u64 %rd6, %rd5;
 st.local.b32 [%rd5], %r1;
 mov.f64 %fd1, 0d3FF8000000000000; st.local.f64 [%rd5+8], %fd1;
 mov.u64 %rd8, word; cvta.global.u64 %rd9, %rd8; st.local.b64 [%rd5+16], %rd9;
 mov.u64 %rd7, form; cvta.global.u64 %rd7, %rd7;
 st.param.b64 [p0], %rd7; st.param.b64 [p1], %rd6;
 call (r0), vprintf, (p0, p1);
 ld.param.b32 %r9, [r0];
"""


def run(text, **launch):
    gpu = device("sm_100a")
    x = gpu.empty(1)
    gpu.run_ptx(text, x, x, **launch)


def test_each_lane_prints_its_values(ptx_kernel, capsys):
    run(ptx_kernel(CALL, before=strings("lane %03d: %5.2f %s 100%%\n")), block=(3, 1, 1))
    assert capsys.readouterr().out == "".join(f"lane {i:03d}:  1.50 six 100%\n" for i in range(3))


def test_unsigned_hexadecimal_and_long(ptx_kernel, capsys):
    body = CALL.replace("st.local.b32 [%rd5], %r1;", "st.local.b64 [%rd5], -2;")
    run(ptx_kernel(body, before=strings("%llu|%e|%p")), block=(1, 1, 1))
    out = capsys.readouterr().out
    assert out.startswith("18446744073709551614|1.500000e+00|0x")
    run(ptx_kernel(body, before=strings("%x %i")), block=(1, 1, 1))
    assert capsys.readouterr().out == "fffffffe -1"


def test_an_assertion_that_fails_says_what_and_where(ptx_kernel):
    body = """
 .param .b64 p0; .param .b64 p1; .param .b32 p2; .param .b64 p3; .param .b64 p4;
 mov.u64 %rd7, form; cvta.global.u64 %rd7, %rd7; mov.u64 %rd8, word; cvta.global.u64 %rd8, %rd8;
 setp.ne.u32 %p1, %r1, 2;
 @%p1 bra FINE;
 st.param.b64 [p0], %rd7; st.param.b64 [p1], %rd8; mov.u32 %r4, 77; st.param.b32 [p2], %r4;
 st.param.b64 [p3], %rd8; st.param.b64 [p4], 1;
 call __assertfail, (p0, p1, p2, p3, p4);
FINE:
"""
    with pytest.raises(KernelTrap, match=r"lane 2: assertion failed: a < b \(six:77\)"):
        run(ptx_kernel(body, before=strings("a < b")))
