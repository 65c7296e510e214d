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
SCALES_A, SCALES_B, MATRIX_A = 128, 160, 192  # columns of tensor memory; D is at 0


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


def word(**fields):
    """An instruction descriptor from fields by name."""
    places = {
        "saturate": 3, "d": 4, "sfb": 4, "a": 7, "b": 10, "neg_a": 13, "neg_b": 14, "n": 17, "scale": 23,
        "m": 24, "sfa": 29, "k": 31,
    }  # fmt: skip
    return sum((v >> {"n": 3, "m": 4}.get(name, 0)) << places[name] for name, v in fields.items())


def chunked(octets):
    """Rows of bytes (rows, n) as shared memory holds them without swizzle: (n / 16, rows, 16)."""
    return np.ascontiguousarray(octets).view(np.uint8).reshape(len(octets), -1, 16).transpose(1, 0, 2)


def stored(cells, column, register=20):
    """Store cells (128, n), which lie in y, to columns of tensor memory."""
    count = cells.shape[1]
    lines = [
        f" mad.lo.u32 %r6, %r1, {4 * count}, {0};",
        " cvt.u64.u32 %rd5, %r6;",
        " add.u64 %rd5, %rd5, %rd2;",
    ]
    for i in range(count):
        lines.append(f" ld.global.b32 %r{register}, [%rd5+{4 * i}];")
        lines.append(f" tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11+{column + i}], {{%r{register}}};")
    return "\n".join(lines)


class Multiplication:
    """One MMA on A and B in shared memory, each (rows, bytes of K), or A in tensor memory.

    Args:
        kind: with the modifiers that follow it.
        a: bytes (M, ...) in shared memory, or None.
        b: bytes (N, ...).
        cells: uint32 (128, n) that are stored to tensor memory first, from column `first` on.
        first: that column.
    """

    def __init__(self, kind, a, b, descriptor, *, cells=None, first=0, group=1):
        self.kind, self.descriptor, self.group = kind, descriptor, group
        self.cells, self.first = cells, first
        self.parts = [chunked(b)] if a is None else [chunked(a), chunked(b)]

    def source(self, kernel, tail="", accumulate=False, d=0, a="%rd7", columns=64, modifiers=""):
        """The kernel; the MMA's mask, scales or shift stand in `tail` with {p} for the predicate."""
        offset = 0 if len(self.parts) == 1 else self.parts[0].size // self.group
        places = [
            matrix_descriptor(start, leading=part.shape[1] // self.group * 16, stride=128)
            for part, start in zip((self.parts[0], self.parts[-1]), (0, offset), strict=True)
        ]
        tail = (tail or "{p}").format(p="%p6")
        opcode = f"tcgen05.mma.cta_group::{self.group}.kind::{self.kind}{modifiers}"
        mma = f"""
 mov.b64 %rd7, {places[0]};
 mov.b64 %rd8, {places[1]};
 mov.b32 %r40, {self.descriptor:#x};
 setp.{"eq" if accumulate else "ne"}.u32 %p6, 0, 0;
 add.u32 %r41, %r10, {d};
 add.u32 %r42, %r10, {MATRIX_A | d & 0xFFFF0000};
 add.u32 %r43, %r10, {SCALES_A};
 add.u32 %r44, %r10, {SCALES_B};
 {opcode} [%r41], {a}, %rd8, %r40, {tail};
"""
        before = ""
        if self.cells is not None:
            before = stored(self.cells, self.first) + "\n tcgen05.wait::st.sync.aligned;\n bar.sync 0;\n"
        if self.group == 2:
            before += CLUSTER + "\n mov.b16 %rs1, 3;\n"
        mask = ", %rs1" if self.group == 2 else ""
        body = before + committed(mma, self.group, mask) + load(columns)
        return program(body, kernel, words=self.words.shape[1], group=self.group)

    @property
    def words(self):
        """Words of shared memory of each CTA: its rows of A and of B, one after the other."""
        halves = []
        for rank in range(self.group):
            pieces = [np.split(part, self.group, axis=1)[rank].reshape(-1) for part in self.parts]
            halves.append(np.concatenate(pieces).view(np.uint32))
        size = -(-len(halves[0]) // 128) * 128
        return np.stack([np.pad(half, (0, size - len(half))) for half in halves])

    def run(self, kernel, columns=64, options=None, **form):
        """Columns of D from 0 on, uint32 (CTAs * 128, columns), and the run."""
        source = self.source(kernel, columns=columns, **form)
        # What is stored to tensor memory first is read from y, which the result then replaces.
        count = self.group * 128 * max(columns, 0 if self.cells is None else self.cells.shape[1])
        start = None if self.cells is None else self.cells.reshape(-1)
        y, launched = run(source, self.words, count, ctas=self.group, start=start, **(options or {}))
        return y[: self.group * 128 * columns].reshape(-1, columns), launched


def small(rng, shape, dtype=np.float16):
    """Multiples of 1/4 up to 4: sums of their products are exact."""
    return (rng.integers(-16, 17, shape) / 4).astype(dtype)


def product(a, b):
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)
