"""Element by element: vector loads where a whole vector is left, predicated ones at the ragged end."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute

from .case import Buffer, Case, normal, output

THREADS = 64


@cute.kernel
def _affine(
    x: cute.Tensor, y: cute.Tensor, scale: cutlass.Float32, shift: cutlass.Float32, width: cutlass.Constexpr
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    first = (block * THREADS + thread) * width
    count = cute.size(y)
    vectors_x, vectors_y = cute.zipped_divide(x, (width,)), cute.zipped_divide(y, (width,))
    loaded = cute.make_rmem_tensor(width, x.element_type)
    result = cute.make_rmem_tensor(width, y.element_type)
    if first + width <= count:
        cute.autovec_copy(vectors_x[(None, first // width)], loaded)
        result.store((loaded.load().to(cutlass.Float32) * scale + shift).to(y.element_type))
        cute.autovec_copy(result, vectors_y[(None, first // width)])
    else:
        for i in cutlass.range_constexpr(width):
            if first + i < count:
                y[first + i] = (x[first + i].to(cutlass.Float32) * scale + shift).to(y.element_type)


@cute.jit
def affine(
    x: cute.Pointer, y: cute.Pointer, count: cutlass.Int32, scale: cutlass.Float32, shift: cutlass.Float32,
    width: cutlass.Constexpr,
):  # fmt: skip
    """y = scale * x + shift in fp32, `width` elements a thread."""
    layout = cute.make_layout(count)
    grid = (cute.ceil_div(count, THREADS * width), 1, 1)
    _affine(cute.make_tensor(x, layout), cute.make_tensor(y, layout), scale, shift, width).launch(
        grid=grid, block=(THREADS, 1, 1)
    )


def case(source: torch.dtype, target: torch.dtype, count: int, nbytes: int = 16) -> Case:
    """x (count,) -> y (count,), `nbytes` a vector; the scale, 0.75, and the shift, 1.5, have few bits."""
    # At most 16 bits each, so that product and sum are exact whether they are fused or not.
    x = (normal((count,)) * 2**11).round() / 2**6
    x = x.to(source)
    expected = (x.double() * 0.75 + 1.5).float()
    width = nbytes // max(source.itemsize, target.itemsize)
    numbers = cutlass.Int32(count), cutlass.Float32(0.75), cutlass.Float32(1.5)
    arguments = Buffer(x, align=nbytes), output(expected.to(target), align=nbytes), *numbers
    return Case(affine, arguments, {"width": width})


@cute.kernel
def _add(
    a: cute.Tensor,
    b: cute.Tensor,
    c: cute.Tensor,
    shape: cute.Shape,
    tiler: cute.Shape,
    layout_tv: cute.Layout,
):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    here = ((None, None), block)
    places = cute.zipped_divide(cute.make_identity_tensor(c.shape), tiler)[here]
    tiled = [cute.zipped_divide(t, tiler)[here] for t in (a, b, c)]
    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), a.element_type)
    copy = cute.make_tiled_copy(atom, layout_tv, tiler)
    mine = copy.get_slice(thread)
    part_a, part_b, part_c = [mine.partition_S(t) for t in tiled]
    part_places = mine.partition_S(places)
    inside = cute.make_rmem_tensor(part_places.shape, cutlass.Boolean)
    for i in cutlass.range_constexpr(cute.size(inside)):
        inside[i] = cute.elem_less(part_places[i], shape)
    ra, rb, rc = [cute.make_fragment_like(t) for t in (part_a, part_b, part_c)]
    for t in (ra, rb):
        t.fill(0)
    cute.copy(atom, part_a, ra, pred=inside)
    cute.copy(atom, part_b, rb, pred=inside)
    rc.store(ra.load() + rb.load())
    cute.copy(atom, rc, part_c, pred=inside)


@cute.jit
def add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    """c = a + b, (M, N) with any strides, through tiled copies with a predicate for each element."""
    tiler, layout_tv = cute.make_layout_tv(
        cute.make_ordered_layout((4, 16), order=(1, 0)), cute.make_ordered_layout((2, 2), order=(1, 0))
    )
    blocks = cute.size(cute.zipped_divide(c, tiler), mode=[1])
    _add(a, b, c, c.shape, tiler, layout_tv).launch(grid=(blocks, 1, 1), block=(64, 1, 1))


def add_case(dtype: torch.dtype, rows: int, columns: int, passed: str) -> Case:
    """(rows, columns), the second operand column-major."""
    a = normal((rows, columns), dtype)
    b = normal((columns, rows), dtype, seed=1).t()
    element = a.element_size()
    return Case(add, (
        Buffer(a, passed=passed, align=element), Buffer(b, passed=passed, align=element),
        output(a + b, passed=passed, align=element),
    ))  # fmt: skip
