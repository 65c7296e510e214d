"""Weights from NVFP4 in shared memory to bf16 in registers, as an MMA of Hopper takes its first operand.

A product of a code and its block scale has at most 6 significant bits, so that nothing is rounded. It comes
out 2^-7 times as large: a code's bits at the right places of a bf16 are its value times 2^-126, and block
scales are made 2^119 times as large, just short of overflow.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Uint32, cute
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.gemm_sm90a_form import CHUNK_BYTES, SLICE, Form

FACTOR = 2.0**7  # that makes products right
_STEPS = SLICE // 16  # MMAs of a slice, each with one block of K
_UP = 0x7B807B80  # 2^120 in both halves, as bf16
_UP_LESS = 0x7B007B00  # 2^119


@dataclass(frozen=True)
class Place:
    """What of a stage this thread reads.

    Attributes:
        codes: addresses of the first stage's chunks of 16 bytes in the row of weights with this thread's
            number in its warpgroup's MMA; another one is 8 rows behind it.
        scales: address of four block scales of that row.
        selector: of the byte with this thread's two codes of 8, for `prmt`.
        pair_selector: of this thread's block scale in both rows, each followed by copies of its sign.
    """

    codes: list
    scales: Int32
    selector: Uint32
    pair_selector: Uint32


def place(form: Form, codes: Int32, scales: Int32, share: Int32, half: Int32) -> Place:
    """Of this thread.

    Args:
        codes, scales: addresses in shared memory.
        share: which part of a stage its warpgroup multiplies.
        half: 1 where a tile of 64 rows is the second half of a chunk of block scales.
    """
    thread, _, _ = cute.arch.thread_idx()
    lane = thread % 32
    row, quad = thread // 32 % (4 * form.warpgroups) * 16 + lane // 4, lane % 4
    # 128, 64 or 32 bytes of a row are swizzled over as many rows as TMA moves to other banks.
    swizzle = row % 8 * form.code_bytes // 128
    own = form.own_slices
    first = codes + row * form.code_bytes
    chunks = [first + ((share * own * 2 + i) ^ swizzle) * 16 for i in range(2 * own)]
    in_chunk = row + 64 * half
    scale = share * own * CHUNK_BYTES + in_chunk % 32 * 16 + in_chunk // 32 * 4
    return Place(chunks, scales + scale, Uint32(quad + 0x4440), Uint32(quad * 0x1111 + 0xC480))


@cute.jit
def load(form: cutlass.Constexpr[Form], at: Place, stage: Int32, part: cutlass.Constexpr[int]):
    """Codes of 64 of K, as (words, rows, chunks of 16 bytes), and block scales by MMA.

    Args:
        part: which 64 of those of the stage that this warpgroup multiplies.
    """
    r_codes = cute.make_rmem_tensor((4, 2, 2), Uint32)
    for chunk in cutlass.range_constexpr(2):
        first = at.codes[part * 2 + chunk] + stage * (form.features * form.code_bytes)
        for row in cutlass.range_constexpr(2):
            source = _words(first, 4, row * 8 * form.code_bytes)
            cute.autovec_copy(source, r_codes[None, row, chunk])
    return r_codes, _block_scales(form, at, stage, part)


@cute.jit
def spread(at: Place, r_codes: cute.Tensor, r_spread: cute.Tensor):
    """Codes as bf16, each 2^-126 times as large.

    Args:
        r_codes: what `load` gave.
        r_spread: (16,) words, four of each MMA; rows g and g + 8, first of 8 of K, then of 8 more.
    """
    for step in cutlass.range_constexpr(_STEPS):
        for word in cutlass.range_constexpr(2):
            for row in cutlass.range_constexpr(2):
                codes = r_codes[step % 2 * 2 + word, row, step // 2]
                r_spread[step * 4 + word * 2 + row] = _pair(codes, at.selector)


@cute.jit
def scale(r_spread: cute.Tensor, scales: list, r_a: cute.Tensor):
    """The operands of all MMAs of 64 of K, of what `spread` and `load` gave."""
    for i in cutlass.range_constexpr(4 * _STEPS):
        r_a[i] = _scaled(r_spread[i], scales[i // 4], i % 2)


@cute.jit
def keep(words: cute.Tensor | list, never: Int32, address: Int32):
    """Have the assembler finish these words before, and leave their registers alone up to here.

    It takes registers for free that MMAs in flight read, from one round of a loop to the next, and moves a
    wait for them to the front. A store that never happens tells it, in a step for every four words.

    Args:
        words: a multiple of 4.
        never: 0, which only the host knows.
        address: in shared memory, a multiple of 16.
    """
    count = cutlass.const_expr(len(words) if isinstance(words, list) else cute.size(words))
    for i in cutlass.range_constexpr(0, count, 4):
        cute.arch.inline_ptx(
            "{ .reg .pred p; setp.ne.s32 p, {$r0}, 0; "
            "@p st.shared.v4.b32 [{$r1}], {{$r2}, {$r3}, {$r4}, {$r5}}; }",
            read_only_args=[never, address, *[words[i + j] for j in range(4)]],
        )


def _block_scales(form: Form, at: Place, stage: Int32, part: int) -> list[Uint32]:
    """Of each MMA, 2^119 times the block scales of rows g and g + 8, as two bf16.

    A thread of a quad converts those of one MMA and gets the others from its neighbours.
    """
    first = at.scales + stage * (form.slices * CHUNK_BYTES)
    words = [_marked(_words(first, 1, part * CHUNK_BYTES + row * 8 * 16)[0].to(Uint32)) for row in range(2)]
    pair = ptx.assembly("prmt.b32 $0, $1, $2, $3;", "r", *words, at.pair_selector)
    text = (
        "{.reg .b32 t, f; shl.b32 t, $1, 4; and.b32 t, t, 0xFFF0FFF0; "
        f"mov.b32 f, 0x{_UP:X}; mul.rn.bf16x2 t, t, f; mov.b32 f, 0x{_UP_LESS:X}; mul.rn.bf16x2 $0, t, f;}}"
    )
    mine = ptx.assembly(text, "r", pair)
    lane = cute.arch.lane_idx()
    return [cute.arch.shuffle_sync(mine, lane // 4 * 4 + i) for i in range(_STEPS)]


def _words(address: Int32, count: int, offset: int) -> cute.Tensor:
    """Words in shared memory, at a multiple of their size."""
    first = cute.make_ptr(Uint32, address, cute.AddressSpace.smem, assumed_align=4 * count)
    return cute.make_tensor(first + offset // 4, cute.make_layout(count))


def _marked(word: Uint32) -> Uint32:
    """Four block scales, with the sign set, which none of them has, where one is NaN: only its successor
    needs another bit. The shift that follows makes all ones of it, which are a NaN of bf16 too."""
    text = "{.reg .b32 t; add.u32 t, $1, 0x01010101; lop3.b32 $0, $1, t, 0x80808080, 0xF8;}"
    return ptx.assembly(text, "r", word)


def _pair(codes: Uint32, selector: Uint32) -> Uint32:
    """Two neighbouring weights, their bits where a bf16 has its own.

    Args:
        codes: 8 of them, two for each thread of a quad.
    """
    text = (
        "{.reg .b32 b, m, s; prmt.b32 b, $1, 0, $2; "
        "mul.lo.u32 m, b, 0x40040; mul.lo.u32 s, b, 0x1001000; and.b32 s, s, 0x80008000; "
        "lop3.b32 $0, m, 0x01C001C0, s, 0xEA;}"
    )
    return ptx.assembly(text, "r", codes, selector)


def _scaled(pair: Uint32, scales: Uint32, row: int) -> Uint32:
    """Two weights times one of two block scales."""
    half = "{h, h}" if row else "{l, l}"
    text = (
        f"{{.reg .b32 s; .reg .b16 l, h; mov.b32 {{l, h}}, $2; mov.b32 s, {half}; mul.rn.bf16x2 $0, $1, s;}}"
    )
    return ptx.assembly(text, "r", pair, scales)
