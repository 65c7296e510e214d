"""Host side of the GEMM kernels: from the operations' tensors to forms, grids and launches.

With contiguous tensors, swizzled scales of the activations and K % 32 == 0, a call allocates nothing. What
kernels do not take is copied first: activations whose scales are linear get swizzled ones, rows of codes that
are not whole 16 bytes (K % 32 == 16) get zeros behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from dsv4lab.kernels import decode_gemm_sm100a
from dsv4lab.kernels import gemm_weights as weights
from dsv4lab.kernels.choose import Prefill, choose, most_tiles
from dsv4lab.kernels.decode_choice import Decode
from dsv4lab.kernels.gemm_form import Form
from dsv4lab.kernels.grouped_gemm_sm100a import make
from dsv4lab.kernels.launch import As, launch
from dsv4lab.kernels.quantize_plan import sm_count
from dsv4lab.kernels.quantize_run import Outputs, kernel_input
from torch import Tensor

from dsv4lab import layouts
from dsv4lab.formats import BLOCK, scales_shape

CODE = cutlass.Float4E2M1FN
_MAX_ROWS = 2**31 - 2**9  # so that the number of every row of the last tile is an int32
_MAX_SCALES = 2**31 - 1  # of one matrix of weights


@dataclass(frozen=True)
class Product:
    """Operands as kernels take them.

    Attributes:
        a, b: codes (rows, K/2) and (groups, N, K/2) or (N, K/2).
        a_scales, b_scales: swizzled.
        g_a, g_b: global scales, one after the other.
        a_row, a_group, b_group: steps in them, see gemm_epilogue.Factors.
        column_scale: see gemm_form.Form.
        offsets, sizes: (groups,) or None.
        rows, n, k, groups: sizes.
    """

    a: Tensor
    b: Tensor
    a_scales: Tensor
    b_scales: Tensor
    g_a: Tensor
    g_b: Tensor
    a_row: int
    a_group: int
    b_group: int
    column_scale: str
    offsets: Tensor | None
    sizes: Tensor | None
    rows: int
    n: int
    k: int
    groups: int

    @property
    def arguments(self) -> list:
        """What all kernels get first."""
        codes = (As(self.a, CODE), As(self.b, CODE))
        return [*codes, self.a_scales, self.b_scales, self.g_a, self.g_b, self.offsets, self.sizes]

    @property
    def numbers(self) -> list[int]:
        """What all kernels get behind their outputs."""
        return [self.rows, self.n, self.k, self.groups, self.a_row, self.a_group, self.b_group]


@dataclass(frozen=True)
class Output:
    """What becomes of the sums.

    Attributes:
        kind: "bf16", "swiglu" or "nvfp4", see gemm_form.Form.
        limit: of the activation.
        swizzled: layout of block scales.
        tensors: bf16 values; or codes, block scales and their global scale.
    """

    kind: str
    limit: float | None
    swizzled: bool
    tensors: tuple[Tensor, ...]

    @property
    def targets(self) -> list[Tensor | None]:
        """All that kernels may write, None where this kind has nothing."""
        return [*self.tensors, None, None][:3]

    @property
    def bound(self) -> float:
        """The limit as kernels take it; those compiled without one do not look at it."""
        return 0.0 if self.limit is None else float(self.limit)


def implementations(run: Callable[[list, Output], None]) -> dict[str, Callable[..., None]]:
    """The operations of dsv4lab.gemm, as functions that fill their last arguments.

    Args:
        run: computes the operations' operands into an output, of which there is something to compute.
    """

    def compute(operands: list, output: Output) -> None:
        if not output.tensors[0].numel():
            return
        if operands[5].numel():
            run(operands, output)
            return
        # No weights, so that all rows are padding.
        for tensor in output.tensors[:2]:
            tensor.zero_()

    def grouped_mm(*args) -> None:
        *operands, out = args
        outputs = Outputs()
        target = outputs.take(out, (operands[0].shape[0], operands[5].shape[-2]))
        compute(operands, Output("bf16", None, False, (target,)))
        outputs.finish()

    def grouped_mm_swiglu(*args) -> None:
        *operands, limit, out = args
        outputs = Outputs()
        target = outputs.take(out, (operands[0].shape[0], operands[5].shape[-2] // 2))
        compute(operands, Output("swiglu", limit, False, (target,)))
        outputs.finish()

    def grouped_mm_swiglu_quantize(*args) -> None:
        *operands, limit, g, layout, codes, scales = args
        outputs = Outputs()
        shape = (operands[0].shape[0], operands[5].shape[-2] // 2)
        codes = outputs.take(codes, (shape[0], shape[1] // 2))
        scales = outputs.take(scales, scales_shape(shape, layout))
        compute(operands, Output("nvfp4", limit, layout == "swizzled", (codes, scales, kernel_input(g))))
        outputs.finish()

    functions = (grouped_mm, grouped_mm_swiglu, grouped_mm_swiglu_quantize)
    return {function.__name__: function for function in functions}


def refuses(*operands) -> str | None:
    """Why kernels cannot multiply the operations' operands; None if they can."""
    if operands[1] is None:
        return "it multiplies NVFP4 activations only, got bf16 ones: quantize them first"
    return refuses_sizes(operands[0].shape[0], *operands[5].shape[-2:])


def refuses_sizes(rows: int, n: int, half: int) -> str | None:
    """Why kernels cannot multiply so many rows with codes (..., n, half); None if they can."""
    if n % 8:
        return f"it needs b with N % 8 == 0, got N = {n}"
    if rows > _MAX_ROWS or 2 * n * half // BLOCK > _MAX_SCALES:
        return (
            f"its kernels count up to {_MAX_ROWS} rows and {_MAX_SCALES} block scales of a weight matrix, "
            f"got {rows} rows and N x K = {n} x {2 * half}"
        )
    return None


def _run(operands: list, output: Output) -> None:
    """Compute with the kernel that suits the sizes."""
    product = prepare(*operands)
    groups = None if product.offsets is None else product.groups
    choice = choose(product.rows, product.n, product.k, groups, sm_count(product.a.device))
    launcher = decode_gemm_sm100a.run if isinstance(choice, Decode) else run_prefill
    launcher(product, output, choice)


def prepare(
    a: Tensor, a_scales: Tensor, a_global: Tensor, a_layout: str, a_granularity: str, b: Tensor,
    b_scales: Tensor, b_global: Tensor, b_layout: str, b_interleaved: bool, offsets: Tensor | None,
    sizes: Tensor | None,
) -> Product:  # fmt: skip
    """The operations' operands as kernels take them.

    Raises:
        ValueError: kernels refuse them.
    """
    if reason := refuses(a, a_scales, a_global, a_layout, a_granularity, b):
        raise ValueError(reason)
    rows, n, k = a.shape[0], b.shape[-2], a.shape[-1] * 2
    if a_layout == "linear":
        a_scales = layouts.swizzle_scales(kernel_input(a_scales), backend="blackwell")
    halves = "interleaved" if b_interleaved else "halves"
    a, b = kernel_input(a), kernel_input(b)
    return Product(
        weights.padded_rows(a) if k % weights.ROW_CODES else a,
        weights.whole_rows(b),
        kernel_input(a_scales),
        weights.swizzled_scales(b_scales) if b_layout == "linear" else kernel_input(b_scales),
        kernel_input(a_global),
        kernel_input(b_global),
        int(a_granularity == "token"),
        int(a_granularity == "group"),
        1 if b_global.dim() == 1 else 2 * (b_global.dim() == 2),
        halves if b_global.dim() == 2 else "one",
        None if offsets is None else kernel_input(offsets),
        None if sizes is None else kernel_input(sizes),
        rows, n, k + k % weights.ROW_CODES, 1 if b.dim() == 2 else b.shape[0],
    )  # fmt: skip


def run_prefill(product: Product, output: Output, choice: Prefill) -> None:
    """Launch the kernel for many rows."""
    n, grouped = product.n, product.offsets is not None
    form = Form(
        choice.rows, choice.columns, grouped, output.kind, product.column_scale, output.limit is not None,
        output.swizzled, n // 2 % 32 == 0,
    )  # fmt: skip
    most = most_tiles(choice, product.rows, n, product.groups if grouped else None)
    clusters = min(sm_count(product.a.device) // choice.ctas, most)
    launch(make, (form,), [*product.arguments, *output.targets, *product.numbers, output.bound, clusters])


IMPLEMENTATIONS: dict[str, Callable[..., None]] = implementations(_run)
