"""The last step of a runtime global scale that two launches make: the largest of the first one's results."""

# No annotations from __future__: the DSL reads them as types.
import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Float32, Int32, Int64, cute
from dsv4lab.kernels.launch import As, launch
from dsv4lab.kernels.quantize_block import runtime_scale
from dsv4lab.kernels.quantize_scales import largest_part

_WARPS = 4


@cute.kernel
def _largest_parts(m_parts: cute.Pointer, m_g: cute.Pointer, scales: Int32, parts: Int32, divisor: Float32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    index = block * _WARPS + thread // 32
    if index < scales:
        g = runtime_scale(largest_part(m_parts + Int64(index) * parts, parts), divisor)
        if thread % 32 == 0:
            cute.make_tensor(m_g + index, cute.make_layout(1))[0] = g


_largest_parts.set_name_prefix("largest_parts", remove_cutlass_symbol=True, keep_mangled_name=False)


def make_largest_parts():
    """The host function: a warp for each scale."""

    @cute.jit
    def largest(
        m_parts: cute.Pointer,
        m_g: cute.Pointer,
        scales: Int32,
        parts: Int32,
        divisor: Float32,
        stream: cuda.CUstream,
    ):
        _largest_parts(m_parts, m_g, scales, parts, divisor).launch(
            grid=(cute.ceil_div(scales, _WARPS), 1, 1), block=(32 * _WARPS, 1, 1), stream=stream
        )

    return largest


def largest_parts(parts: torch.Tensor, count: int, divisor: float, g: torch.Tensor) -> None:
    """g (scales,) or () from the amax bits (scales, count); count is a multiple of 4 and at most 512."""
    if g.numel():
        launch(make_largest_parts, (), [As(parts, cutlass.Uint32), g, g.numel(), count, float(divisor)])
