"""One-token steps on a GPU: captured once as a CUDA graph, then replayed for every token.

A step is thousands of small kernels, and launching each of them from Python takes longer than running it. A
replay repeats what the capture saw: the same kernels on the same memory. So the cache's steps are fixed (see
`Cache`), the layers' scratch memory is held (see `workspace`), and tokens and logits have a buffer each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from dsv4lab.layers import warmup

from .cache import Cache


class DecodeStep:
    """Replays a model's one-token step, for a cache that it writes in place.

    What the model is at capture stays captured: weights may change in place, but layers must not be
    quantized, laid out anew, or given another policy or hooks. The cache may be reset and filled by prompts
    as before, so one capture serves many generations. `close`, or leaving it as a context manager, lets the
    memory go.

    Args:
        model: a `DeepseekV4` on a CUDA device.
        cache: from its `new_cache`, at any length that leaves room for a token. Its one-token steps are fixed
            from here on; what it holds stays as it is.

    Attributes:
        logits: (B, V) float32, the buffer that each step overwrites.

    Raises:
        ValueError: not on one CUDA device, a full cache, or a model with hooks or observers, which a replay
            would not call.
        RuntimeError: the capture failed.
    """

    def __init__(self, model, cache: Cache):
        device = _check_device(model, cache)
        _check_unobserved(model)
        cache.check(cache.batch, 1)
        self.cache = cache
        self._tokens = tokens = torch.zeros(cache.batch, 1, dtype=torch.int64, device=device)
        held = ExitStack()
        self._release = weakref.finalize(self, held.close)

        def run() -> Tensor:
            return model(tokens, cache, last_only=True)[:, -1]

        def prepare() -> None:
            held.enter_context(warmup(model, cache.batch, tokens=()).on(device).hold())
            run()
            # Whatever a step wrote, the next one at the same position writes again.
            cache.position.sub_(1)

        length, fixed = cache.length, cache.fixed
        cache.fixed = True
        try:
            self._graph, self.logits = record(prepare, run, device)
        except BaseException:
            cache.fixed = fixed
            held.close()
            raise
        finally:
            cache.length = length

    def __call__(self, tokens: Tensor) -> Tensor:
        """Add one token to each sequence and predict the next, without waiting for the device.

        Args:
            tokens: (B,) int64 on the device, within the vocabulary.

        Returns:
            `logits`: copy what shall outlive the next step.

        Raises:
            TypeError, ValueError: tokens of another kind, shape or device; a full cache.
            RuntimeError: the step was closed.
        """
        if self._graph is None:
            raise RuntimeError("the decode step was closed")
        want = self._tokens
        if not isinstance(tokens, Tensor) or tokens.dtype != want.dtype:
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens must be an int64 tensor, got {got}")
        if tokens.shape != want.shape[:1] or tokens.device != want.device:
            raise ValueError(
                f"tokens must be ({want.shape[0]},) on {want.device}, "
                f"got {tuple(tokens.shape)} on {tokens.device}"
            )
        self.cache.check(self.cache.batch, 1)
        want.copy_(tokens[:, None])
        self._graph.replay()
        self.cache.length += 1  # the replay advanced the position on the device
        return self.logits

    def close(self) -> None:
        """Give up the graph and its memory, and let the layers' scratch memory grow again."""
        self._graph = self.logits = None
        self._release()

    def __enter__(self) -> DecodeStep:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def record(prepare: Callable[[], None], run: Callable[[], Tensor], device: torch.device):
    """Call `prepare` and capture `run`, both on one stream of their own.

    Returns:
        The graph, and the tensor that `run` returned, which each replay overwrites.

    Raises:
        RuntimeError: the capture failed, for the reason given.
    """
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            prepare()
        current.wait_stream(stream)
        graph, failed = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.graph(graph, stream=stream):
                result = _noting(failed, run)
        except RuntimeError as error:  # maybe the end of the capture's, which only says that something failed
            reason = (str([*failed, error][0]).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"the decode step could not be captured as a CUDA graph: {reason} "
                "(graph=False decodes without one)"
            ) from error
    return graph, result


def _noting(failed: list[Exception], run: Callable[[], Tensor]) -> Tensor:
    try:
        return run()
    except Exception as error:
        failed.append(error)
        raise


def _check_device(model, cache: Cache) -> torch.device:
    device = cache.position.device
    on = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    if device.type != "cuda" or on != {device}:
        where = ", ".join(sorted(str(d) for d in on))
        raise ValueError(f"model and cache must be on one CUDA device, got {where} and {device}")
    return device


def _check_unobserved(model) -> None:
    for name, module in model.named_modules():
        hooks = module._forward_hooks or module._forward_pre_hooks
        if hooks or getattr(module, "observer", None) is not None:
            raise ValueError(
                f"model must have no hooks or observers, which a replayed graph does not call, but "
                f"{name or 'it'} has one: remove it, or decode with graph=False"
            )
