"""Host side of the GEMM kernels for Hopper: from the operations' tensors to a kernel and its launch.

Activations are bf16, or NVFP4 with block scales in either layout. With contiguous tensors and K % 32 == 0 a
call allocates nothing; rows of activations that are not whole (K % 32 == 16) get zeros behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import torch
from dsv4lab.kernels import decode_gemm_sm90a, gemm, grouped_gemm_sm90a
from dsv4lab.kernels import gemm_weights as weights
from dsv4lab.kernels.choose_sm90a import choose
from dsv4lab.kernels.decode_sm90a_choice import Decode
from dsv4lab.kernels.gemm import Output
from dsv4lab.kernels.launch import As
from dsv4lab.kernels.quantize_plan import sm_count
from dsv4lab.kernels.quantize_run import kernel_input
from torch import Tensor

from dsv4lab import layouts


@dataclass(frozen=True)
class Product(gemm.Product):
    """Operands as kernels take them.

    Attributes:
        a: bf16 values (rows, K), or codes (rows, K/2).
        a_scales, g_a: None where a is bf16.
        activations: "bf16", or the layout of a_scales.
    """

    activations: str = "bf16"

    @property
    def arguments(self) -> list:
        """What all kernels get first."""
        words = [As(tensor, cutlass.Uint32) for tensor in (self.a, self.b)]
        return [*words, self.a_scales, self.b_scales, self.g_a, self.g_b, self.offsets, self.sizes]


def refuses(*operands) -> str | None:
    """Why kernels cannot multiply the operations' operands; None if they can."""
    return gemm.refuses_sizes(operands[0].shape[0], *operands[5].shape[-2:])


def run(operands: list, output: Output) -> None:
    """Compute with the kernel that suits the sizes."""
    product = prepare(*operands)
    groups = None if product.offsets is None else product.groups
    sizes = (product.rows, product.n, product.k, groups, sm_count(product.a.device))
    choice = choose(*sizes, product.activations != "bf16", output.kind == "nvfp4")
    launcher = decode_gemm_sm90a.run if isinstance(choice, Decode) else grouped_gemm_sm90a.run
    launcher(product, output, choice)


def prepare(
    a: Tensor, a_scales: Tensor | None, a_global: Tensor | None, a_layout: str, a_granularity: str, b: Tensor,
    b_scales: Tensor, b_global: Tensor, b_layout: str, b_interleaved: bool, offsets: Tensor | None,
    sizes: Tensor | None,
) -> Product:  # fmt: skip
    """The operations' operands as kernels take them.

    Raises:
        ValueError: kernels refuse them.
    """
    if reason := refuses(a, a_scales, a_global, a_layout, a_granularity, b):
        raise ValueError(reason)
    rows, n, k = a.shape[0], b.shape[-2], b.shape[-1] * 2
    rest = k % weights.ROW_CODES
    a = kernel_input(a)
    if rest:
        a = torch.nn.functional.pad(a, (0, rest)) if a_scales is None else weights.padded_rows(a)
    if a_scales is not None:
        a_scales = kernel_input(a_scales)
        if rest and a_layout == "linear":
            a_scales, a_layout = layouts.swizzle_scales(a_scales, backend="hopper"), "swizzled"
    halves = "interleaved" if b_interleaved else "halves"
    return Product(
        a,
        kernel_input(weights.whole_rows(b)),
        a_scales,
        weights.swizzled_scales(b_scales) if b_layout == "linear" else kernel_input(b_scales),
        None if a_global is None else kernel_input(a_global),
        kernel_input(b_global),
        int(a_granularity == "token"),
        int(a_granularity == "group"),
        1 if b_global.dim() == 1 else 2 * (b_global.dim() == 2),
        halves if b_global.dim() == 2 else "one",
        None if offsets is None else kernel_input(offsets),
        None if sizes is None else kernel_input(sizes),
        rows, n, k + rest, 1 if b.dim() == 2 else b.shape[0],
        activations="bf16" if a_scales is None else a_layout,
    )  # fmt: skip


IMPLEMENTATIONS: dict[str, Callable[..., None]] = gemm.implementations(run)
