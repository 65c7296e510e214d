"""What every linear of the model shares: a weight in high precision or NVFP4, and how checkpoints hold it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..formats import BLOCK, SCALE_DTYPE, NVFP4Tensor
from ..layouts import deinterleave_gate_up, interleave_gate_up, swizzle_scales, unswizzle_scales
from ..quantize import quantize_nvfp4
from .keep_float32 import KeepsFloat32

NVFP4_NAMES = ("weight", "weight_scale", "weight_scale_2", "input_scale")


class Weight(KeepsFloat32):
    """A matrix (N, K), or a stack (G, N, K) of matrices, that a linear multiplies activations with.

    In high precision `weight` is a parameter. After `quantize_`, or after loading NVFP4 tensors, it is the
    buffer of codes uint8 (..., N, K/2) beside `weight_scale` uint8 (..., N, K/16), the bytes of E4M3,
    `weight_scale_2` float32 and, where known, `input_scale` float32. State dicts always hold gate rows before
    up rows and matrices as checkpoints have them, whatever order the buffers are in.

    Args:
        shape: (N, K) or (G, N, K); K is the contraction and stands last.
        nvfp4: whether the layer becomes NVFP4 when its model is quantized.
        parts: 2 where gate and up rows share the matrix and have a global scale each, else 1.
        dtype, device: of the high-precision parameter.

    Attributes:
        weight_transform, activation_transform: differentiable functions put on the weight and on the
            input of the high-precision product, None by default; quantization-aware training sets them.
        interleaved: whether gate and up rows of the codes alternate in runs of 8.
        scale_layout: of `weight_scale`, "linear" or "swizzled".
    """

    float32_names = ("weight_scale_2", "input_scale")

    def __init__(self, *shape: int, nvfp4: bool = True, parts: int = 1, dtype=None, device=None):
        super().__init__()
        self.nvfp4, self.parts, self.interleaved, self.scale_layout = nvfp4, parts, False, "linear"
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
        self.weight_transform: Callable[[Tensor], Tensor] | None = None
        self.activation_transform: Callable[[Tensor], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the weight uniformly within 1/sqrt(K), as torch's own linear does."""
        bound = 1.0 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    @property
    def quantized(self) -> bool:
        """Whether the weight is NVFP4."""
        return "weight" in self._buffers

    @property
    def K(self) -> int:
        """Length of the contraction."""
        return self.weight.shape[-1] * (2 if self.quantized else 1)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The high-precision weight in `dtype`, through the training hook where there is one."""
        weight = self.weight.to(dtype)
        return weight if self.weight_transform is None else self.weight_transform(weight)

    def nvfp4_weight(self) -> NVFP4Tensor:
        """The quantized weight as an operand of the GEMM."""
        g = self.weight_scale_2
        if self.parts == 2:
            g = g.view(-1, 2)
        granularity = "group" if g.dim() else "tensor"
        scales = self.weight_scale.view(SCALE_DTYPE)
        return NVFP4Tensor(self.weight, scales, g, self.scale_layout, granularity, self.interleaved)

    @torch.no_grad()
    def quantize_(self, input_scale: Tensor | float | None = None) -> Weight:
        """Turn the weight into NVFP4, in place.

        Args:
            input_scale: static global scale of the input, decode direction, where a calibration gave one.
        """
        if self.quantized:
            raise RuntimeError("the weight is quantized already")
        self._hold(self._quantize(self.weight))
        if input_scale is not None:
            self.set_input_scale(input_scale)
        return self

    def set_input_scale(self, input_scale: Tensor | float | None) -> None:
        """Set the static global scale of the input, decode direction: float32 (), or (G,) for G matrices."""
        if input_scale is not None:
            device = self.weight.device
            input_scale = torch.as_tensor(input_scale, dtype=torch.float32, device=device).detach().clone()
            input_scale = input_scale.squeeze() if input_scale.numel() == 1 else input_scale
        self.register_buffer("input_scale", input_scale)

    def _stack_shape(self, weight: Tensor) -> tuple[int, ...]:
        """(N, K) or (G, N, K) as the buffers hold it."""
        return tuple(weight.shape)

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One global scale for each matrix, and for gate and up."""
        return (*shape[:-2], *([2] if self.parts == 2 else []))

    def _quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of NVFP4, with gate rows before up rows."""
        shape = self._stack_shape(weight)
        scale_shape = self._scale_shape(shape)
        blocks = weight.detach().reshape(math.prod(scale_shape), -1, shape[-1])
        q = quantize_nvfp4(blocks, "group")
        return {
            "weight": q.codes.reshape(*shape[:-1], -1),
            "weight_scale": q.block_scales.view(torch.uint8).reshape(*shape[:-1], -1),
            "weight_scale_2": q.global_scale.reshape(scale_shape),
        }

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        """Replace the parameter by buffers."""
        del self.weight
        for name in NVFP4_NAMES:
            self.register_buffer(name, None if name not in tensors else _counting(tensors[name]))
        interleaved, self.interleaved = self.interleaved, False
        self.set_interleaved(interleaved)

    def set_interleaved(self, interleaved: bool) -> None:
        """Bring gate and up rows of the codes and scales into runs of 8, or back into halves."""
        self._lay_out(("weight", "weight_scale"), interleaved, self.scale_layout)

    def set_scale_layout(self, scale_layout: str) -> None:
        """Bring the block scales into the order "swizzled" of block-scaled MMAs, or back into "linear"."""
        self._lay_out(("weight_scale",), self.interleaved, scale_layout)

    def _lay_out(self, names: tuple[str, ...], interleaved: bool, scale_layout: str) -> None:
        if self.quantized and (interleaved, scale_layout) != (self.interleaved, self.scale_layout):
            plain = {name: self._plain(name, getattr(self, name)) for name in names}
            self.interleaved, self.scale_layout = interleaved, scale_layout
            for name, tensor in plain.items():
                setattr(self, name, _counting(self._laid_out(name, tensor)))
        self.interleaved = interleaved

    def _plain(self, name: str, tensor: Tensor) -> Tensor:
        """Codes or block scales of the buffers with gate before up, and linear."""
        if name == "weight_scale" and self.scale_layout == "swizzled":
            rows, columns = self.weight.shape[-2], self.K // BLOCK
            tensor = unswizzle_scales(tensor, rows, columns, backend="reference")
        return deinterleave_gate_up(tensor) if self.interleaved else tensor

    def _laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse; in plain torch, which moves a checkpoint's tensors on any device."""
        tensor = interleave_gate_up(tensor) if self.interleaved else tensor
        if name == "weight_scale" and self.scale_layout == "swizzled":
            return swizzle_scales(tensor, backend="reference")
        return tensor

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.quantized:
            return
        for name in ("weight", "weight_scale"):
            destination[prefix + name] = self._as_saved(self._plain(name, destination[prefix + name]))

    def _as_saved(self, tensor: Tensor) -> Tensor:
        return tensor

    def _as_held(self, tensor: Tensor) -> Tensor:
        return tensor

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype == torch.float4_e2m1fn_x2:
            weight = state_dict[prefix + "weight"] = weight.view(torch.uint8)
        if weight is not None:
            if weight.dtype != torch.uint8 and not weight.is_floating_point():
                raise TypeError(f"{prefix}weight must be floating point, or uint8 codes, got {weight.dtype}")
            if weight.dtype == torch.uint8 and not self.quantized:
                self._hold(self._empty_nvfp4())
            if weight.is_floating_point():
                self._load_floating(state_dict, prefix, weight)
            else:
                self._load_nvfp4(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _empty_nvfp4(self) -> dict[str, Tensor]:
        shape, device = self._stack_shape(self.weight), self.weight.device
        return {
            "weight": torch.empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device=device),
            "weight_scale": torch.empty(*shape[:-1], shape[-1] // 16, dtype=torch.uint8, device=device),
            "weight_scale_2": torch.empty(self._scale_shape(shape), dtype=torch.float32, device=device),
        }

    def _load_floating(self, state_dict, prefix: str, weight: Tensor) -> None:
        """A quantized layer quantizes the high-precision weight that it is given."""
        if not self.quantized:
            return
        for name, tensor in self._quantize(weight).items():
            state_dict[prefix + name] = tensor if name == "weight_scale_2" else self._laid_out(name, tensor)
        if self.input_scale is not None:
            state_dict.setdefault(prefix + "input_scale", self.input_scale)

    def _load_nvfp4(self, state_dict, prefix: str) -> None:
        """Bring a checkpoint's tensors into the order and shapes of the buffers."""
        for name in ("weight", "weight_scale"):
            tensor = state_dict.get(prefix + name)
            if tensor is not None:
                state_dict[prefix + name] = self._laid_out(name, self._as_held(tensor.view(torch.uint8)))
        g = state_dict.get(prefix + "weight_scale_2")
        if g is not None:
            state_dict[prefix + "weight_scale_2"] = self._spread_scale(g)
        given = state_dict.get(prefix + "input_scale")
        self.set_input_scale(None if given is None else torch.empty_like(given, device=self.weight.device))
        if given is not None:
            state_dict[prefix + "input_scale"] = given.reshape(self.input_scale.shape)

    def _spread_scale(self, g: Tensor) -> Tensor:
        """One scale given for all matrices, or for gate and up together, is written out for each."""
        want = self.weight_scale_2.shape
        if g.shape == want or g.numel() not in (1, math.prod(want[:1])):
            return g
        g = g.reshape(-1, 1) if len(want) == 2 else g.reshape(-1)
        return g.reshape(()) if not want else g.expand(want).contiguous()

    def extra_repr(self) -> str:
        form = "NVFP4" if self.quantized else str(self.weight.dtype).removeprefix("torch.")
        return f"{'x'.join(str(n) for n in (*self.weight.shape[:-1], self.K))}, {form}"


def _counting(tensor: Tensor) -> Tensor:
    """A tensor that counts its changes, as decoded copies of it need; those of inference mode do not."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def check_activation(name: str, x: Tensor | NVFP4Tensor, features: int) -> None:
    """Raise unless `x` is a floating or NVFP4 tensor (..., features)."""
    if not isinstance(x, Tensor | NVFP4Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if len(x.shape) < 1 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}), got {tuple(x.shape)}")
