"""What is done to all quantizable layers of a model at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .. import workspace
from ..workspace import Workspaces
from .activation import QuantizedInput
from .experts import Experts
from .grouped_linear import GroupedLinear
from .linear import Linear
from .moe import MoE
from .shared_expert import SharedExpert


def quantizable_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedInput]]:
    """(name, layer) of every layer that becomes NVFP4 with its model, or is already."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedInput) and (layer.nvfp4 or layer.quantized):
            yield name, layer


def quantize_model_(
    model: nn.Module,
    activation_scale: str | Callable = "token",
    calibration: Mapping[str, Tensor] | None = None,
    activation_dtype: str = "nvfp4",
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Turn the weights of all quantizable layers into NVFP4, in place.

    Args:
        model: any module that is built on these layers.
        activation_scale: as for set_activation_scale_.
        calibration: input_scale of each layer by name, as `calibrate` returns it; layers not in it keep none.
        activation_dtype: "nvfp4", or "bf16" for weight-only quantization.
        progress: called with each layer's name before it is quantized.

    Returns:
        The model.
    """
    scales = dict(calibration or {})
    layers = dict(quantizable_layers(model))
    if unknown := sorted(scales.keys() - layers.keys()):
        raise ValueError(f"calibration names {unknown[0]!r}, which is no quantizable layer of the model")
    for name, layer in layers.items():
        if progress is not None:
            progress(name)
        if not layer.quantized:
            layer.quantize_()
        if name in scales:
            layer.set_input_scale(scales[name])
        layer.activation_dtype = activation_dtype
    set_activation_scale_(model, activation_scale)
    return model


def set_activation_scale_(model: nn.Module, policy: str | Callable) -> dict[str, str | Callable]:
    """Set the global-scale policy of every quantizable layer's input.

    Args:
        model: any module that is built on these layers.
        policy: "token", "tensor", "static", "bound", "group" or a callable. Where nothing bounds an input,
            "bound" leaves the layer at "token"; "group" is for grouped linears, others get "token".

    Returns:
        What each layer got, by name.

    Raises:
        ValueError: unknown policy; "static" while a quantized layer has no input_scale.
    """
    layers = dict(quantizable_layers(model))
    given: dict[str, str | Callable] = {}
    for name, layer in layers.items():
        missing = layer.quantized and layer.input_scale is None
        if policy == "static" and missing:
            raise ValueError(
                f"activation_scale 'static' needs an input_scale, and {name} has none: calibrate"
            )
        unbounded = policy == "bound" and layer.activation_bound is None
        ungrouped = policy == "group" and "group" not in layer.policies
        given[name] = "token" if unbounded or ungrouped else policy
    for name, layer in layers.items():
        layer.activation_scale = given[name]
    return given


@torch.no_grad()
def warmup(model: nn.Module, max_tokens: int, tokens: Iterable[int] | None = None) -> Workspaces:
    """Compile and allocate all that steps of up to `max_tokens` tokens need, on the current stream.

    Args:
        model: a model whose layers are quantized.
        max_tokens: the largest number of tokens in a step.
        tokens: further sizes to compile for, which take kernels of their own where they are few; None takes
            the powers of two. Outside of a capture what is missing is compiled when it is first called.

    Returns:
        The model's workspaces, shared by its layers; `on(device).hold()` while a captured graph lives.

    Raises:
        RuntimeError: a capture runs.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    if workspace.is_capturing():
        raise RuntimeError("warmup compiles and allocates, which a capture does not allow: call it before")
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    shared = next((m.workspaces for m in experts if m.workspaces is not None), None) or Workspaces()
    for layer in experts:
        layer.workspaces = shared
    for layer in model.modules():
        if isinstance(layer, QuantizedInput) and layer.quantized:
            layer.product_weight()
    sizes = {max_tokens, *(2**i for i in range(max_tokens.bit_length()) if tokens is None), *(tokens or ())}
    matrices = (p.dtype for p in model.parameters() if p.dim() > 1)
    dtype = next(matrices, torch.bfloat16)
    for layer in _one_of_each_kind(model):
        for size in sorted((s for s in sizes if s <= max_tokens), reverse=True):
            _run_once(layer, size, dtype)
    return shared


def _one_of_each_kind(model: nn.Module) -> Iterator[nn.Module]:
    """Layers, whole experts as one, that differ in what kernels are compiled or memory allocated for."""
    seen, inside = set(), set()
    for layer in model.modules():
        if layer in inside or not isinstance(layer, Linear | GroupedLinear | SharedExpert | MoE):
            continue
        inside.update(layer.modules())
        kind = _kind(layer)
        if kind not in seen:
            seen.add(kind)
            yield layer


def _kind(layer: nn.Module) -> tuple:
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return (
        type(layer),
        tuple((name, t.shape, t.dtype, t.device) for name, t in tensors),
        tuple(
            (str(m.activation_scale), m.activation_dtype, m.activation_bound, m.interleaved, m.backend)
            for m in layer.modules()
            if isinstance(m, QuantizedInput)
        ),
        tuple(m.route_weight for m in layer.modules() if isinstance(m, Experts)),
    )


def _run_once(layer: nn.Module, tokens: int, dtype: torch.dtype) -> None:
    """Run one layer on zeros in its own dtype, or in the given one where it has none."""
    weight = next(layer.parameters(), None)
    dtype = dtype if weight is None else weight.dtype
    device = next(layer.buffers()).device if weight is None else weight.device
    zeros = partial(torch.zeros, dtype=dtype, device=device)
    if isinstance(layer, MoE):
        layer(zeros(tokens, layer.hidden), torch.zeros(tokens, dtype=torch.int64, device=device))
    elif isinstance(layer, GroupedLinear):
        layer(zeros(tokens, layer.groups, layer.in_features))
    else:
        layer(zeros(tokens, layer.w13.in_features if isinstance(layer, SharedExpert) else layer.in_features))
