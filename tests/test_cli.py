"""The command line, run in process: output, exit codes, one line for each kind of bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4lab import checkpoint, corpus
from dsv4lab import evaluate as ev
from dsv4lab.cli import main, progress
from dsv4lab.corpus import EvaluationText, LibraryFile

COMMANDS = ("doctor", "decode", "evaluate", "calibrate", "quantize", "lab")


@pytest.fixture
def run(capsys):
    """Run the command line; returns exit code, stdout, stderr."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def bad(run):
    """Run with bad input: code 2, nothing on stdout, exactly one line on stderr, which is returned."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, (code, out, err)
        return err

    return call


@pytest.fixture(scope="session")
def quantized(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "nvfp4"
    checkpoint.quantize_checkpoint(tiny_checkpoint, folder)
    return folder


@pytest.fixture
def small_library(monkeypatch, tmp_path):
    """A text of a few hundred bytes instead of the running Python's library."""
    files = (LibraryFile("a.py", b"import os\n" * 20),)
    monkeypatch.setattr(corpus, "evaluation_text", lambda: EvaluationText(files, "3.11.0", tmp_path, ()))
    batches = ev.calibration_batches
    small = lambda model, text=None: batches(model, files[0].data if text is None else text)  # noqa: E731
    monkeypatch.setattr(ev, "calibration_batches", small)


# ---- what the commands do


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    code, out, err = run(command, "--help")
    assert code == 0 and err == "" and f"usage: dsv4lab {command}" in out


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    assert run("--version")[1].startswith("dsv4lab 0.")


def test_doctor_says_which_backend_runs(run):
    code, out, _ = run("doctor")
    assert code == 0
    for name in ("reference", "emulator"):
        assert re.search(rf"^{name} +available$", out, re.MULTILINE), out
    assert re.search(r"^blackwell +(available|no: .)", out, re.MULTILINE), out
    report = json.loads(run("doctor", "--json")[1])
    assert report["backends"]["reference"] == {"available": True, "reason": ""}
    assert not report["backends"]["hopper"]["available"] and report["backends"]["hopper"]["reason"]


def test_decode_streams_the_prompt_and_its_continuation(run, tiny_checkpoint):
    arguments = ("decode", "--model", tiny_checkpoint, "--prompt", "import ", "--max-new-tokens", 8)
    code, out, err = run(*arguments)
    assert code == 0 and out.startswith("import ") and out.endswith("\n") and "tokens/s" in err
    report = json.loads(run(*arguments, "--json")[1])
    assert out == "import " + report["text"] + "\n"
    assert report["prompt_tokens"] == 8 and report["new_tokens"] == 8 and report["tokens_per_second"] > 0
    assert report["precision"] == "nvfp4" and report["activation_scale"] == "token"


def test_decode_from_an_nvfp4_checkpoint_equals_quantizing_on_the_fly(run, tiny_checkpoint, quantized):
    arguments = ("decode", "--prompt", "x", "--max-new-tokens", 12, "--json", "--model")
    a, b = (json.loads(run(*arguments, model)[1]) for model in (tiny_checkpoint, quantized))
    assert a["text"] == b["text"] and a["new_tokens"] == b["new_tokens"]


def test_weights_quantized_on_disk_and_in_memory_have_the_same_bits(tiny_model, quantized):
    import copy

    from dsv4lab.layers import quantize_model_

    loaded = checkpoint.load_model(quantized).state_dict()
    memory = quantize_model_(copy.deepcopy(tiny_model)).state_dict()
    assert loaded.keys() == memory.keys()
    for name, tensor in memory.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("policy", ["tensor", "token", "static", "bound"])
def test_decode_under_every_policy(run, tiny_checkpoint, small_library, policy):
    code, out, _ = run("decode", "--model", tiny_checkpoint, "--prompt", "x", "--max-new-tokens", 3,
                       "--activation-scale", policy, "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["activation_scale"] == policy


def test_a_seed_repeats_a_draw(run, tiny_checkpoint):
    arguments = ("decode", "--model", tiny_checkpoint, "--prompt", "x", "--max-new-tokens", 20,
                 "--temperature", 1.0, "--precision", "bf16", "--json", "--seed")  # fmt: skip
    first, second, other = (json.loads(run(*arguments, seed)[1])["text"] for seed in (1, 1, 2))
    assert first == second != other


def test_evaluate_prints_every_variant(run, tiny_checkpoint, small_library):
    code, out, _ = run("evaluate", "--model", tiny_checkpoint, "--max-bytes", 60, "--json")
    report = json.loads(out)
    assert code == 0 and [v["name"] for v in report["variants"]] == [str(v) for v in ev.VARIANTS]
    assert all(v["bits_per_byte"] > 0 and v["ratio_to_xz"] > 0 for v in report["variants"])
    assert all(len(v["sqnr_db_per_layer"]) == 3 for v in report["variants"][1:])
    code, out, _ = run("evaluate", "--model", tiny_checkpoint, "--max-bytes", 60)
    assert (
        code == 0
        and "nvfp4 static / 16" in out
        and "60 bytes of 1 files out of 200 held out, of Python 3.11.0's library" in out
    )


def test_evaluate_an_nvfp4_checkpoint_with_scales(run, tiny_checkpoint, small_library, tmp_path):
    assert run("quantize", tiny_checkpoint, tmp_path / "q", "--calibrate", "import os and sys")[0] == 0
    code, out, _ = run("evaluate", "--model", tmp_path / "q", "--max-bytes", 40, "--json")
    variants = json.loads(out)["variants"]
    assert code == 0 and len(variants) == len(ev.VARIANTS) - 1
    assert all(v["token_agreement"] is None for v in variants)


def test_evaluate_an_nvfp4_checkpoint_without_scales(run, quantized, small_library):
    code, out, err = run("evaluate", "--model", quantized, "--max-bytes", 30, "--json")
    assert code == 0 and "static policy is left out" in err
    assert [v["activation_scale"] for v in json.loads(out)["variants"]] == ["tensor", "token", "bound"]


def test_quantize_writes_a_checkpoint(run, tiny_checkpoint, tmp_path):
    code, out, _ = run("quantize", tiny_checkpoint, tmp_path / "q", "--json")
    report = json.loads(out)
    assert code == 0 and report["quantized"] == 60 and not report["calibrated"]
    assert report["bytes_out"] < report["bytes_in"]
    assert "layers.0.attn.wq_a.input_scale" not in checkpoint.load(tmp_path / "q")[1]


def test_quantize_with_calibration_writes_its_scales(run, tiny_checkpoint, tmp_path):
    (tmp_path / "text").write_bytes(b"def f(x):\n    return x\n" * 10)
    assert run("quantize", tiny_checkpoint, tmp_path / "q", "--calibrate", tmp_path / "text")[0] == 0
    _, out, _ = run("calibrate", "--model", tiny_checkpoint, "--text", tmp_path / "text", "--json")
    scales = json.loads(out)
    _, state = checkpoint.load(tmp_path / "q")
    written = {n.removesuffix(".input_scale"): s for n, s in state.items() if n.endswith(".input_scale")}
    assert written.keys() == scales.keys() and len(scales) == 3 * 9
    for name, scale in written.items():
        assert torch.equal(scale, torch.tensor(scales[name]["input_scale"]).expand(scale.shape)), name
    code, out, _ = run("decode", "--model", tmp_path / "q", "--prompt", "def", "--max-new-tokens", 3,
                       "--activation-scale", "static", "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["new_tokens"] == 3


def test_calibrate_prints_a_table(run, tiny_checkpoint):
    code, out, _ = run("calibrate", "--model", tiny_checkpoint, "--text", "a text with spaces")
    assert code == 0 and "layers.2.ffn.experts.w13" in out and "input_scale" in out


def test_lab_starts_jupyter_in_the_notebooks(run, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append((os.getcwd(), arguments)))
    monkeypatch.chdir(".")  # put the folder back afterwards
    assert run("lab", "--", "--no-browser")[0] == 0
    ((folder, arguments),) = started
    assert os.path.basename(folder) == "notebooks" and arguments[1:] == ["-m", "jupyterlab", "--no-browser"]


def test_the_shipped_model_is_the_default_wherever_one_is(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("decode", "--prompt", "import ", "--max-new-tokens", 12, "--json")
    text = json.loads(out)["text"]
    assert code == 0 and len(text) == 12 and text.isascii() and text.replace("\n", " ").isprintable()


# ---- bad input


@pytest.mark.parametrize("arguments, message", [
    ((), "required: COMMAND"),
    (("dance",), "invalid choice: 'dance'"),
    (("decode",), "required: --prompt"),
    (("decode", "--prompt", "x", "--max-new-tokens", "0"), "whole number from 1 on, got '0'"),
    (("decode", "--prompt", "x", "--activation-scale", "block"), "invalid choice: 'block'"),
    (("decode", "--prompt", "x", "--precision", "fp8"), "invalid choice: 'fp8'"),
    (("decode", "--prompt", "x", "--seed", "one"), "whole number of at most 64 bits, got 'one'"),
    (("decode", "--prompt", "x", "--seed", str(2**64)), "whole number of at most 64 bits"),
    (("decode", "--prompt", "x", "--model", ""), "config.json"),
    (("decode", "--prompt", "x", "--device", "meta"), "--device meta"),
    (("evaluate", "--max-bytes", "-3"), "whole number from 1 on, got '-3'"),
    (("quantize", "only-one"), "required: DST"),
])  # fmt: skip
def test_wrong_arguments(bad, arguments, message):
    assert message in bad(*arguments)


def test_prompts_longer_than_the_context(bad, tiny_checkpoint):
    line = bad("decode", "--model", tiny_checkpoint, "--prompt", "x" * 400)
    assert "401 tokens and 200 new ones exceed the model's 320 positions" in line


def test_temperature_below_zero(bad, tiny_checkpoint):
    assert "temperature must be" in bad(
        "decode", "--model", tiny_checkpoint, "--prompt", "x", "--temperature", -1
    )


def test_unknown_device(bad, tiny_checkpoint):
    assert "--device tpu9" in bad("decode", "--model", tiny_checkpoint, "--prompt", "x", "--device", "tpu9")
    if not torch.cuda.is_available():
        assert "--device cuda" in bad(
            "decode", "--model", tiny_checkpoint, "--prompt", "x", "--device", "cuda"
        )


def test_bf16_from_an_nvfp4_checkpoint(bad, quantized):
    assert "cannot run in bf16" in bad("decode", "--model", quantized, "--prompt", "x", "--precision", "bf16")


def test_static_without_input_scales(bad, quantized):
    line = bad("decode", "--model", quantized, "--prompt", "x", "--activation-scale", "static")
    assert "input_scale" in line and "calibrate" in line


@pytest.fixture
def broken(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint with its tensors changed by a function, its config by another."""

    def make(change=None, settings=None):
        folder = tmp_path / "broken"
        shutil.copytree(tiny_checkpoint, folder)
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        if settings:
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**values, **settings}))
        return folder

    return make


WQ_A = "model.layers.1.attn.wq_a.weight"
BROKEN = {
    "missing": ({"change": lambda t: t.pop(WQ_A)}, "layers.1.attn.wq_a.weight is missing"),
    "mistyped": ({"change": lambda t: t.update({WQ_A: t[WQ_A].int()})}, f"{WQ_A} is I32"),
    "misshapen": ({"change": lambda t: t.update({WQ_A: t[WQ_A].T.contiguous()})}, f"{WQ_A} has shape"),
    "unknown": ({"change": lambda t: t.update({"extra": t[WQ_A].clone()})}, "extra is not one of the model"),
    "contradicted": ({"settings": {"hidden_size": 128}}, "but config.json asks for"),
    "not a model": ({"settings": {"num_attention_heads": 0}}, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("defect", BROKEN)
def test_broken_checkpoints_are_one_line_everywhere_and_nothing_is_written(bad, broken, tmp_path, defect):
    options, message = BROKEN[defect]
    folder = broken(**options)
    for arguments in (
        ("decode", "--prompt", "x", "--model", folder),
        ("calibrate", "--text", "some text", "--model", folder),
        ("quantize", folder, tmp_path / "q"),
    ):
        line = bad(*arguments)
        assert message in line and str(folder) in line
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_truncated_checkpoint(bad, broken, tmp_path):
    folder = broken()
    os.truncate(folder / "model.safetensors", 20000)
    assert "model.safetensors: truncated" in bad("quantize", folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_destinations_that_cannot_be_written(bad, tiny_checkpoint, tmp_path):
    assert f"{tmp_path}: exists already" in bad("quantize", tiny_checkpoint, tmp_path)
    (tmp_path / "file").write_text("")
    assert "no such folder" in bad("quantize", tiny_checkpoint, tmp_path / "file" / "q")
    assert "no such folder" in bad("quantize", tiny_checkpoint, tmp_path / "nowhere" / "q")
    assert "/proc" in bad("quantize", tiny_checkpoint, "/proc/q")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_where_the_shipped_model_is_not(bad, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "NANO", tmp_path / "nano")
    assert "nano comes with the repository, not with a wheel" in bad("decode", "--prompt", "x")


def test_missing_models_and_texts(bad, tiny_checkpoint, tmp_path):
    assert "nowhere: no such folder" in bad("decode", "--prompt", "x", "--model", tmp_path / "nowhere")
    assert "nowhere: no such folder" in bad("quantize", tmp_path / "nowhere", tmp_path / "q")
    assert "no_such.txt: no such file" in bad(
        "calibrate", "--model", tiny_checkpoint, "--text", "no_such.txt"
    )
    (tmp_path / "empty").write_text("")
    assert "empty" in bad("calibrate", "--model", tiny_checkpoint, "--text", tmp_path / "empty")
    assert "empty" in bad("calibrate", "--model", tiny_checkpoint, "--text", "")
    assert bad("calibrate", "--model", tiny_checkpoint, "--text", tmp_path).endswith(
        f": {tmp_path}: Is a directory\n"
    )


# ---- interruptions


def test_interrupted(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv4lab.device.report", interrupted)
    code, _, err = run("doctor")
    assert code == 130 and err.strip() == "dsv4lab doctor: interrupted"


def test_ctrl_c_in_quantize_leaves_nothing(tiny_checkpoint, tmp_path):
    """A real process and a real signal, sent while the copy is being written."""
    code = (
        "import signal, sys, time; from dsv4lab.checkpoint import convert; from dsv4lab.cli import main\n"
        # Who starts tests in the background of a shell has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "original = convert.quantize_weight\n"
        "def slow(w):\n    print('working', flush=True); time.sleep(30); return original(w)\n"
        "convert.quantize_weight = slow\nsys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "quantize", tiny_checkpoint, tmp_path / "q"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error(tiny_checkpoint):
    command = [sys.executable, "-m", "dsv4lab", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) == 0


def test_closed_output_is_no_error(tiny_checkpoint):
    arguments = ("decode", "--model", tiny_checkpoint, "--prompt", "x", "--max-new-tokens", "2")
    command = 'exec "$0" -m dsv4lab "$@" >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, sys.executable, *arguments], timeout=60).returncode == 0


def test_progress_shows_after_two_seconds_and_not_before(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.Progress("counting") as bar:
        for second in range(30):
            now[0] = 100.0 + second
            bar(second, 30, "sheep")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["counting: 2 of 30 sheep", "counting: 12 of 30 sheep", "counting: 22 of 30 sheep"]
