"""The numeric contract on one block, as kernels have it: every bf16, and floats around every border."""

# No annotations from __future__: the DSL reads them as types.
import math

import cuda.bindings.driver as cuda
import cutlass
import pytest
import torch
from cutlass import Float32, Int32, Uint32, cute
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels.launch import As, launch

from dsv4lab import reference
from dsv4lab.emulator import device

THREADS = 128
BORDERS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


@cute.kernel
def _encode(
    has_e2m1: cutlass.Constexpr[bool],
    words: cutlass.Constexpr[int],
    m_x: cute.Pointer,
    m_step: cute.Pointer,
    m_codes: cute.Pointer,
    m_amax: cute.Pointer,
    count: Int32,
):
    thread, _, _ = cute.arch.thread_idx()
    index, _, _ = cute.arch.block_idx()
    i = index * THREADS + thread
    x = cute.make_tensor(m_x, cute.make_layout((words, count)))
    codes = cute.make_tensor(m_codes, cute.make_layout((2, count)))
    if i < count:
        values = [Uint32(x[j, i]) for j in range(words)]
        step = Float32(cute.make_tensor(m_step, cute.make_layout(count))[i])
        first, second = block.encode(values, step, has_e2m1)
        codes[0, i] = first
        codes[1, i] = second
        cute.make_tensor(m_amax, cute.make_layout(count))[i] = block.amax(values)


def make_encode(has_e2m1: bool, words: int):
    """Codes and amax of blocks, each with a step of its own."""

    @cute.jit
    def encode(
        m_x: cute.Pointer,
        m_step: cute.Pointer,
        m_codes: cute.Pointer,
        m_amax: cute.Pointer,
        count: Int32,
        stream: cuda.CUstream,
    ):
        _encode(has_e2m1, words, m_x, m_step, m_codes, m_amax, count).launch(
            grid=((count + THREADS - 1) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    return encode


# Blackwell can do without its conversion, too.
@pytest.fixture(scope="module", params=[("sm_90a", False), ("sm_100a", False), ("sm_100a", True)], ids=str)
def has_e2m1(request):
    """Whether the kernels of the emulated GPU in use convert to E2M1 by an instruction."""
    arch, has_e2m1 = request.param
    with device(arch) as gpu:
        yield has_e2m1
        assert gpu.counters["fusable_mul_add"] == 0


def encode(has_e2m1: bool, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Codes as a reader of bytes finds them (blocks, 8), of x (blocks, 16), and a check of the amax."""
    codes = torch.zeros(len(x), 8, dtype=torch.uint8)
    amax = torch.zeros(len(x), dtype=torch.int32)
    words = 8 * x.dtype.itemsize // 2
    arguments = [As(x, Uint32), step, As(codes, Uint32), As(amax, Uint32), len(x)]
    launch(make_encode, (has_e2m1, words), arguments)
    finite = x.isfinite().all(1)
    assert torch.equal(amax[finite].view(torch.float32), x[finite].abs().amax(1).float())
    assert (amax[~finite] >= 0x7F800000).all()
    return codes


def expected(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """What the reference makes of finite blocks."""
    r = step.reciprocal().nan_to_num(math.nan, 0.0, 0.0)
    return reference.pack(reference.encode_e2m1((x * r[:, None]).nan_to_num(0.0)))


@pytest.mark.parametrize("step", [1.0, 0.37, 448 * 2.0**115, 2.0**-109, 3.3e-12, 0.0, -0.0, math.nan])
def test_every_bf16(has_e2m1, step):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]  # what stands in a block with NaN or Inf has a step of NaN
    x = torch.cat([x, x.new_zeros(-len(x) % 16)]).view(-1, 16)
    steps = torch.full((len(x),), step)
    assert torch.equal(encode(has_e2m1, x, steps), expected(x, steps))


def test_blocks_with_nan(has_e2m1):
    x = torch.randn(64, 16)
    x[torch.arange(64), torch.arange(64) % 16] = math.nan
    x[7, 3], x[8, 3] = math.inf, -math.inf
    for dtype in (torch.bfloat16, torch.float32):
        assert not encode(has_e2m1, x.to(dtype), torch.full((64,), math.nan)).any()


def test_floats_at_every_border(has_e2m1):
    """The floats beside each product that is a tie, for steps of every kind of mantissa."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(512, generator=generator) + 1
    steps *= torch.exp2(torch.randint(-100, 120, (512,), generator=generator))
    steps[:4] = torch.tensor([1.0, 2.0**-9, 448.0, 1 + 2.0**-23])
    x = (steps[:, None] * BORDERS).view(torch.int32)
    x = torch.stack([x + i for i in range(-4, 5)], -1).view(torch.float32).flatten(1)
    x = torch.cat([x, -x[:, :1]], 1).view(-1, 16)
    steps = steps.repeat_interleave(4)
    assert torch.equal(encode(has_e2m1, x, steps), expected(x, steps))


def test_floats_of_any_bits(has_e2m1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-(2**31), 2**31, (8192, 16), generator=generator, dtype=torch.int64).to(torch.int32)
    x = x.view(torch.float32).nan_to_num(1.0)
    steps = torch.exp2(torch.rand(8192, generator=generator) * 200 - 100)
    # Half of them where codes differ.
    x[::2] = (torch.rand(4096, 16, generator=generator) * 16 - 8) * steps[::2, None]
    assert torch.equal(encode(has_e2m1, x, steps), expected(x, steps))
