"""Pieces of PTX for tests of tcgen05: 128 threads a CTA, `x` into shared memory, tensor memory into `y`.

Shared memory holds the address of tensor memory at 0, an mbarrier at 8, a copy of `x` from DATA on. In the
body %r2 is the warp, %r10 the address of tensor memory, %r11 that of the warp's own lanes, %p1 whether the
thread is not of warp 0, %p2 whether it is not thread 0, %r4 the rank in the cluster, %p3 whether that is not
0.
"""

from __future__ import annotations

import numpy as np
import torch

from dsv4lab.emulator import device

DATA = 1024
RESERVED = 1024  # bytes of the window before the dynamic shared memory


def program(body, kernel, *, words=0, columns=512, group=1, free=True, permit=True):
    """A kernel that allocates, copies `words` words of x to shared memory, does `body`, and frees."""
    return kernel(
        f"""
 shr.u32 %r2, %r1, 5;
 mov.u32 %r4, %cluster_ctarank;
 setp.ne.u32 %p1, %r2, 0;
 setp.ne.u32 %p2, %r1, 0;
 setp.ne.u32 %p3, %r4, 0;
 @%p2 bra INITIALISED;
 mov.u32 %r5, smem;
 mbarrier.init.shared.b64 [%r5+8], 1;
 fence.mbarrier_init.release.cluster;
INITIALISED:
 @%p1 bra ALLOCATED;
 mov.u32 %r5, smem;
 tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r5], {columns};
{f" tcgen05.relinquish_alloc_permit.cta_group::{group}.sync.aligned;" if permit else ""}
ALLOCATED:
{to_shared(words)}
 fence.proxy.async.shared::cta;
 bar.sync 0;
{CLUSTER if group == 2 else ""}
 mov.u32 %r5, smem;
 ld.shared.b32 %r10, [%r5];
 shl.b32 %r3, %r2, 21;
 add.u32 %r11, %r10, %r3;
{body}
 bar.sync 0;
{CLUSTER if group == 2 else ""}
 @%p1 bra END;
{f" tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r10, {columns};" if free else ""}
END:
"""
    )


CLUSTER = " barrier.cluster.arrive;\n barrier.cluster.wait;"


def to_shared(words):
    """Copy words of x, `words` of them for each CTA of the cluster, to shared memory."""
    lines = [f" mul.lo.u32 %r6, %r4, {4 * words};", " cvt.u64.u32 %rd4, %r6;", " add.u64 %rd4, %rd4, %rd1;"]
    lines += [" add.u64 %rd4, %rd4, %rd3;", " shl.b32 %r7, %r1, 2;", " mov.u32 %r5, smem;"]
    lines += [" add.u32 %r7, %r7, %r5;"]
    for start in range(0, words, 128):
        lines += [
            f" ld.global.b32 %r8, [%rd4+{4 * start}];",
            f" st.shared.b32 [%r7+{DATA + 4 * start}], %r8;",
        ]
    return "\n".join(lines) if words else ""


def load(columns, register=20, first=0):
    """Store columns of all lanes to y: cell (lane, column) of CTA r to word (r * 128 + lane) * columns."""
    lines = [" shl.b32 %r6, %r4, 7;", " add.u32 %r6, %r6, %r1;", f" mul.lo.u32 %r6, %r6, {4 * columns};"]
    lines += [" cvt.u64.u32 %rd5, %r6;", " add.u64 %rd5, %rd5, %rd2;", f" add.u32 %r7, %r11, {first};"]
    each = min(columns, 8)
    for start in range(0, columns, each):
        names = [f"%r{register + i}" for i in range(each)]
        lines.append(f" tcgen05.ld.sync.aligned.32x32b.x{each}.b32 {{{', '.join(names)}}}, [%r7+{start}];")
        lines += [f" st.global.b32 [%rd5+{4 * (start + i)}], {name};" for i, name in enumerate(names)]
    return "\n".join([*lines, " tcgen05.wait::ld.sync.aligned;"])


def committed(operations, group=1, mask=""):
    """Operations by thread 0 (of the first CTA), with a commit that all threads of the CTAs wait for."""
    multicast = ".multicast::cluster" if mask else ""
    skip = " @%p3 bra ISSUED;" if group == 2 else ""
    return f"""
 @%p2 bra ISSUED;
{skip}
{operations}
 mov.u32 %r5, smem;
 tcgen05.commit.cta_group::{group}.mbarrier::arrive::one.shared::cluster{multicast}.b64 [%r5+8]{mask};
ISSUED:
 mov.u32 %r5, smem;
WAITING:
 mbarrier.try_wait.parity.shared.b64 %p4, [%r5+8], 0;
 @!%p4 bra WAITING;
 tcgen05.fence::after_thread_sync;
"""


def matrix_descriptor(offset, leading=0, stride=0, swizzle=0):
    """Descriptor of a matrix at an offset of the copied data."""
    start = RESERVED + DATA + offset
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | swizzle << 61


def run(text, x=None, y_words=0, ctas=1, start=None, arch="sm_100a", **options):
    """Words of y after the kernel, and the run; x, and `start` for what y holds first, are 32-bit words."""
    gpu = device(arch, **options)
    data = (
        torch.from_numpy(np.ascontiguousarray(x).view(np.int32).reshape(-1).copy()) if x is not None else None
    )
    inputs = gpu.from_torch(data) if data is not None else gpu.empty(1, torch.int32)
    outputs = gpu.empty(max(y_words, 1), torch.int32)
    if start is not None:
        outputs[: len(start)] = torch.from_numpy(start.view(np.int32).copy())
    shape = dict(block=(128, 1, 1), grid=(ctas, 1, 1), cluster=(ctas, 1, 1))
    launched = gpu.run_ptx(text, inputs, outputs, **shape, shared_bytes=DATA + 65536)
    return outputs.numpy().view(np.uint32).copy(), launched
