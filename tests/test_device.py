"""What the machine is said to run, and that the reasons are true."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import device


def test_reference_runs_anywhere():
    assert device.supports("reference") and device.supports("reference").reason == ""


@pytest.mark.parametrize("what", ["hopper", "blackwell"])
def test_backends_without_kernels_say_so(monkeypatch, tmp_path, what):
    monkeypatch.setattr(device, "KERNELS", tmp_path)
    status = device.supports(what)
    assert not status and "not written yet" in status.reason


def test_the_emulator_needs_the_compiler_alone(monkeypatch):
    assert device.supports("emulator")
    monkeypatch.setattr(device, "cutlass_dsl_version", lambda: None)
    assert device.supports("emulator").reason == "nvidia-cutlass-dsl is not installed"


@pytest.mark.parametrize("what", ["cuda", "sm_90a", "sm_100a", "sm_103a"])
def test_a_cpu_build_of_torch_is_named(monkeypatch, what):
    monkeypatch.setattr(torch.version, "cuda", None)
    status = device.supports(what)
    assert not status and "built without CUDA" in status.reason


@pytest.mark.parametrize(
    "found, what, available",
    [
        ((9, 0), "sm_90a", True),
        ((9, 0), "sm_100a", False),
        ((10, 0), "sm_90a", False),
        ((10, 3), "sm_100a", False),
        ((10, 3), "sm_103a", True),
        ((8, 0), "cuda", True),
        ((9, 0), "kernels", True),
        ((10, 0), "kernels", True),
        ((10, 3), "kernels", True),
    ],
)
def test_the_architecture_decides(monkeypatch, found, what, available):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    status = device.supports(what)
    assert bool(status) == available
    if not available:
        wanted = what.removesuffix("a")
        assert status.reason == f"the GPU is sm_{found[0]}{found[1]}, the kernels need {wanted}"


def test_no_kernels_run_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert device.supports("kernels").reason.startswith("the GPU is sm_80, the kernels need sm_90")


def test_a_written_kernel_leaves_the_gpu_as_the_reason(monkeypatch, tmp_path):
    (tmp_path / "hopper.py").touch()
    monkeypatch.setattr(device, "KERNELS", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.supports("hopper").reason == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(device, "cutlass_dsl_version", lambda: None)
    assert device.supports("hopper").reason.startswith("nvidia-cutlass-dsl is not installed; ")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'ampere', but must be one of reference, hopper"):
        device.supports("ampere")


def test_report_covers_every_backend():
    report = device.report()
    assert list(report["backends"]) == list(device.BACKENDS)
    assert all(b["available"] or b["reason"] for b in report["backends"].values())
    assert report["machine"]["torch"] == torch.__version__
