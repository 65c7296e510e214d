"""The routed experts, all in two stacks of matrices, each token visiting k of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import workspace
from ..formats import NVFP4Tensor
from ..gemm import grouped_mm
from . import expert_math
from .activation import QuantizedInput
from .dispatch import Route, check_ids, combine, dispatch, place
from .shared_expert import swiglu, swiglu_bound, swiglu_product
from .weights import check_activation


class Experts(nn.Module):
    """E SwiGLU experts; a token's result is the weighted sum over the k it visits, in float32.

    Args:
        experts: E.
        hidden: H.
        intermediate: I.
        limit: SwiGLU clamp, None for none.
        route_weight: "after" puts the routing weight on w2's output, "before" on its input.
        weight_max: the largest routing weight there can be; enters the bound of w2's input for "before".
        dtype, device: of the parameters.

    The children are `w13` (E, 2I, H), the gate's rows (w1) before up's (w3), and `w2` (E, H, I).

    `algorithm` chooses how high precision is computed: "loop" over the experts in use, reading their sizes
    on the host; "grouped", one grouped product each on bf16 CUDA tensors; "dense", every expert for every
    token with weight zero where it was not chosen, which is the fastest where a token visits half of them;
    "auto" takes the loop on the CPU in eager mode, else dense for E <= 2k, else grouped.
    `fused` is as in SharedExpert.
    """

    def __init__(self, experts: int, hidden: int, intermediate: int, *, limit: float | None = 10.0,
                 route_weight: str = "after", weight_max: float = 1.0, dtype=None, device=None):  # fmt: skip
        super().__init__()
        if route_weight not in ("after", "before"):
            raise ValueError(f'route_weight must be "after" or "before", got {route_weight!r}')
        self.experts, self.hidden, self.intermediate = experts, hidden, intermediate
        self.limit, self.route_weight, self.algorithm = limit, route_weight, "auto"
        made = {"dtype": dtype, "device": device}
        self.w13 = QuantizedInput(experts, 2 * intermediate, hidden, parts=2, **made)
        self.w2 = QuantizedInput(experts, hidden, intermediate, **made)
        self.w2.activation_bound = swiglu_bound(limit, weight_max if route_weight == "before" else 1.0)
        self.fused = intermediate % 8 == 0
        self.workspaces = None

    @property
    def fused(self) -> bool:
        return self.w13.interleaved

    @fused.setter
    def fused(self, fused: bool) -> None:
        self.w13.set_interleaved(fused)

    def forward(self, x: Tensor | NVFP4Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Send each token to its experts and sum what comes back.

        Args:
            x: (T, H) bf16, float32 or NVFP4.
            weights: (T, k) float32.
            chosen: (T, k) int64, expert ids.

        Returns:
            (T, H) float32, as accumulated.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or chosen names an expert that
                does not exist (seen on the CPU only).
        """
        check_activation("x", x, self.hidden)
        if len(x.shape) != 2:
            raise ValueError(f"x must be (T, {self.hidden}), got {tuple(x.shape)}")
        if weights.shape != chosen.shape or chosen.dim() != 2 or chosen.shape[0] != x.shape[0]:
            raise ValueError(
                f"weights and chosen must be ({x.shape[0]}, k) both, "
                f"got {tuple(weights.shape)} and {tuple(chosen.shape)}"
            )
        check_ids("chosen", chosen, self.experts)
        if self.w13.quantized != self.w2.quantized:
            raise RuntimeError("w13 and w2 must be quantized both or neither")
        if not self.w13.quantized:
            return expert_math.high_precision(self, x, weights, chosen)
        return self._nvfp4(x, weights, dispatch(chosen, self.experts))

    def _nvfp4(self, x: Tensor | NVFP4Tensor, weights: Tensor, route: Route) -> Tensor:
        """Products over padded groups. Between them plain torch touches the T k real rows alone."""
        scratch = self._scratch(x.device)
        rows = self.w13.quantize_input(x, "linear")
        a = place(rows, route, route.copies, scratch, self.w13.product_layout)
        h = self._hidden(a, weights, route, scratch)
        out = None if scratch is None else scratch("y", (route.rows, self.hidden), torch.bfloat16)
        groups = (route.offsets, route.sizes)
        y = grouped_mm(h, self.w2.product_weight(), *groups, backend=self.w2.backend, out=out)
        return combine(y, weights if self.route_weight == "after" else None, route)

    def _hidden(self, a: Tensor | NVFP4Tensor, weights: Tensor, route: Route, scratch):
        """What the second product takes, in the padded buffer."""
        groups, layout = (route.offsets, route.sizes), self.w2.product_layout
        alone = self.route_weight == "after" and self.w2.quantizes_rows_alone()
        whole = alone and layout == "swizzled"  # the kernels take the buffer as it is, pads and all
        if self.fused or whole:
            h = swiglu_product(self.w13, self.w2, a, self.limit, *groups, quantize=alone)
            if isinstance(h, NVFP4Tensor):
                return h
            if whole:
                return self.w2.quantize_input(h)
            rows = h[route.slot]
        else:
            gate_up = grouped_mm(a, self.w13.product_weight(), *groups, backend=self.w13.backend)
            rows = swiglu(gate_up[route.slot], self.limit)
        if self.route_weight == "before":
            rows = (rows.float() * weights.flatten()[:, None]).to(rows.dtype)
        return place(self.w2.quantize_input(rows, "linear"), route, 1, scratch, layout)

    def _scratch(self, device: torch.device):
        """Where the padded buffers come from: the model's workspace after a warm-up, else the allocator."""
        if torch.compiler.is_compiling():
            return None
        if self.workspaces is not None:
            return self.workspaces.on(device).get
        if workspace.is_capturing():
            raise RuntimeError(
                "the experts would allocate under capture: call warmup(model, max_tokens) first"
            )
        return None
