"""The block-diagonal linear wo_a of DeepSeek-V4."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import SCALE_DTYPE, NVFP4Tensor, ceil_to
from ..gemm import grouped_mm
from ..layouts import GROUP_ROWS, with_scale_layout
from .activation import QuantizedInput
from .weights import check_activation


class GroupedLinear(QuantizedInput):
    """A linear of its own for each group of the input: `wo_a`, the first half of the output projection.

    Args:
        groups: G.
        in_features_per_group: K.
        out_features_per_group: R; the weight is (G * R, K), as in every checkpoint. A dense weight (G, K, R)
            loads as well.
        dtype, device: of the parameter.

    The policy "group" gives each group a global scale of its own over all tokens.
    """

    policies = ("token", "tensor", "static", "bound", "group")
    stacked = True

    def __init__(self, groups: int, in_features_per_group: int, out_features_per_group: int, *,
                 nvfp4: bool = True, dtype=None, device=None):  # fmt: skip
        rows = groups * out_features_per_group
        super().__init__(rows, in_features_per_group, nvfp4=nvfp4, dtype=dtype, device=device)
        self.groups = groups
        self.in_features, self.out_features = in_features_per_group, out_features_per_group

    def forward(self, x: Tensor | NVFP4Tensor) -> Tensor:
        """Apply each group's matrix to its part of the input.

        Args:
            x: (..., G, K) bf16, float32 or NVFP4 with a scale for the tensor or each token; for wo_a the
                heads' outputs, already rotated back.

        Returns:
            (..., G, R) in x's dtype, bf16 for NVFP4.
        """
        check_activation("x", x, self.in_features)
        if len(x.shape) < 2 or x.shape[-2] != self.groups:
            raise ValueError(f"x must be (..., {self.groups}, {self.in_features}), got {tuple(x.shape)}")
        if not self.quantized:
            return self._high_precision(x)
        a = self.quantize_input(x)
        if isinstance(a, NVFP4Tensor):
            a = with_scale_layout(a, self.product_layout)
        rows, offsets, sizes = _padded_groups(a)
        y = grouped_mm(rows, self.product_weight(), offsets, sizes, backend=self.backend)
        y = y.view(self.groups, -1, self.out_features)[:, : a.shape[1]].transpose(0, 1)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype if isinstance(x, Tensor) else y.dtype)

    def quantize_input(
        self, x: Tensor | NVFP4Tensor, scale_layout: str | None = None
    ) -> Tensor | NVFP4Tensor:
        """The input (..., G, K) with the groups first, (G, T, K), quantized under the layer's policy."""
        return super().quantize_input(self._groups_first(x), scale_layout)

    def static_scale(self) -> Tensor:
        """The calibrated scale, () or one for each group."""
        super().static_scale()
        return self.input_scale

    def amax(self, x: Tensor) -> Tensor:
        """What calibration records of an input (G, T, K): max|x| of each group, float32 (G,)."""
        return x.detach().abs().amax((1, 2)).float() if x.numel() else x.new_zeros(len(x)).float()

    def _groups_first(self, x: Tensor | NVFP4Tensor) -> Tensor | NVFP4Tensor:
        def move(t: Tensor) -> Tensor:
            return t.reshape(-1, self.groups, t.shape[-1]).transpose(0, 1).contiguous()

        if isinstance(x, Tensor):
            return move(x)
        g = x.global_scale
        if x.granularity == "token":
            g = move(g.reshape(*x.shape[:-1], 1))[..., 0]
        elif x.granularity != "tensor":
            raise ValueError(
                f"x must have a global scale for the tensor or each token, got {x.granularity!r}"
            )
        scales = move(with_scale_layout(x, "linear").block_scales.view(torch.uint8)).view(SCALE_DTYPE)
        return NVFP4Tensor(move(x.codes), scales, g, "linear", x.granularity)

    def _high_precision(self, x: Tensor | NVFP4Tensor) -> Tensor:
        rows = self.operand(self._groups_first(x))
        weight = self.matrix(rows.dtype).view(self.groups, self.out_features, self.in_features)
        y = torch.bmm(rows, weight.transpose(1, 2)).transpose(0, 1)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _stack_shape(self, weight: Tensor) -> tuple[int, ...]:
        return self.groups, weight.shape[0] // self.groups, weight.shape[-1]

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def _as_saved(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)

    def _as_held(self, tensor: Tensor) -> Tensor:
        fits = tensor.dim() == 2 and tensor.shape[0] % self.groups == 0
        return tensor.unflatten(0, (self.groups, -1)) if fits else tensor

    def _spread_scale(self, g: Tensor) -> Tensor:
        """A checkpoint may have one scale, or one for each group."""
        if g.shape == (self.groups,):
            self.weight_scale_2 = self.weight_scale_2.new_empty(self.groups)
            return g
        self.weight_scale_2 = self.weight_scale_2.new_empty(())
        return super()._spread_scale(g)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.is_floating_point() and weight.dim() == 3:
            state_dict[prefix + "weight"] = weight.transpose(1, 2).reshape(-1, weight.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _padded_groups(a: Tensor | NVFP4Tensor) -> tuple[Tensor | NVFP4Tensor, Tensor, Tensor]:
    """(G, T, K) as padded groups one after the other, with their offsets and sizes."""
    groups, tokens, _ = a.shape
    padded = ceil_to(tokens, GROUP_ROWS)

    def rows(t: Tensor, fill: int | None = None) -> Tensor:
        """(G, T, ...) with pads that hold anything, or are filled."""
        if padded != tokens:
            held = t.new_empty(groups, padded, *t.shape[2:])
            held[:, :tokens] = t
            if fill is not None:
                held[:, tokens:] = fill
            t = held
        return t.flatten(0, 1)

    sizes = torch.full((groups,), tokens, dtype=torch.int32, device=a.device)
    offsets = torch.arange(1, groups + 1, dtype=torch.int32, device=a.device) * padded
    if isinstance(a, Tensor):
        return rows(a), offsets, sizes
    scales = a.block_scales.view(torch.uint8)
    scales = rows(scales, fill=0) if a.scale_layout == "linear" else scales.flatten(0, 1)
    g = rows(a.global_scale) if a.granularity == "token" else a.global_scale
    scales = scales.view(SCALE_DTYPE)
    return NVFP4Tensor(rows(a.codes), scales, g, a.scale_layout, a.granularity), offsets, sizes
