"""Where a training step's time goes."""

from __future__ import annotations

import time

import torch
from indexers import Indexers
from loop import Loop
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from dsv4lab.layers import fake_quantize

STEPS = 20


def profile(loop: Loop) -> None:
    """Compile, time some steps and their parts, print the slowest kernels.

    Args:
        loop: ready to run.
    """
    cuda = loop.trainee.device.type == "cuda"
    if loop.trainee.kernels:
        _check_kernels(loop.trainee.device)
    loop.warm_up(3)
    print(f"graphs compiled: {dict(torch._dynamo.utils.counters['stats'])}")
    tokens = loop.text.batch * loop.text.context
    for quantizing in (False, True):
        loop.switch(quantizing)
        seconds = _time(loop, lambda: loop.one_step(0.5), STEPS)
        print(f"step, NVFP4 {'on' if quantizing else 'off'}: {seconds * 1e3:.1f} ms, "
              f"{tokens / seconds / 1e6:.3f} MB/s")  # fmt: skip
    _parts(loop)
    if cuda:
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profiler(activities=kinds) as trace:
        for _ in range(3):
            loop.one_step(0.5)
        loop._wait()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = trace.key_averages()
    print(events.table(sort_by=order, row_limit=50, max_name_column_width=90))


def _check_kernels(device: torch.device) -> None:
    """How far the kernels are from the package's functions."""
    import triton_ops

    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(4096, 4, 4, device=device, generator=generator)
    grad = torch.randn(4096, 4, 4, device=device, generator=generator)
    results = []
    for function in (triton_ops.sinkhorn, triton_ops.plain_sinkhorn):
        x = logits.clone().requires_grad_()
        y = function(x, 20, 1e-6)
        y.backward(grad)
        results.append((y.detach(), x.grad))
    (y, dx), (y_plain, dx_plain) = results
    print(f"sinkhorn: kernel and torch differ by at most {(y - y_plain).abs().max():.1e}, gradients by "
          f"{(dx - dx_plain).abs().max():.1e}")  # fmt: skip
    on = torch.ones((), device=device)
    for k in (128, 256):
        x = torch.randn(8192, k, device=device, generator=generator).exp().bfloat16()
        same = triton_ops.fake_quantize(x, on) == fake_quantize(x)
        print(f"rounding to NVFP4, K = {k}: {(~same).sum()} of {same.numel()} values differ")


def _parts(loop: Loop) -> None:
    """Forward, backward and the rest, each with a wait at its end."""
    ids, targets = loop.text.draw(0.5)
    kept = {}

    def forward():
        kept["loss"] = loop.trainee.loss_sum(ids, targets) / targets.numel()

    def both():
        loop.trainee.model.zero_grad(set_to_none=True)
        forward()
        kept["loss"].backward()

    def update():
        loop.optimizer.step(0.0, loop.quantizing)
        loop.trainee.balance(0.0)

    parts = {"draw": lambda: loop.text.draw(0.5), "forward": forward, "forward, backward": both}
    indexers = Indexers(loop.trainee)
    more = {
        "update": update,
        "validate": loop.validate,
        "validate, eager": lambda: loop.validate(eager=True),
        "a step of the indexers": lambda: indexers.one_step(ids, 0.0),
    }
    for name, part in (parts | more).items():
        print(f"{name}: {_time(loop, part, 5) * 1e3:.2f} ms")
    loop.trainee.model.zero_grad(set_to_none=True)


def _time(loop: Loop, part, times: int) -> float:
    part()
    loop._wait()
    before = time.monotonic()
    for _ in range(times):
        part()
    loop._wait()
    return (time.monotonic() - before) / times
