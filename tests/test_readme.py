"""The README's Python runs as printed, and what it names exists."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) >= 20


def test_every_file_named_exists():
    (table,) = re.findall(r"## What is in it\n(.*?)\n\n[A-Z]", README, flags=re.DOTALL)
    firsts = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if "|" in line]
    folder_of = {"quantize.py": "dsv4lab", "policies.py": "dsv4lab", "layouts.py": "dsv4lab",
                 "layers/": "dsv4lab", "calibration.py": "dsv4lab", "checkpoint/": "dsv4lab",
                 "reference.py": "dsv4lab"}  # fmt: skip
    names = [Path(folder_of.get(name, "")) / name for line in firsts for name in line]
    assert len(names) > 10
    missing = [str(name) for name in names if not (ROOT / name).exists()]
    assert not missing


def test_every_make_target_and_command_exists():
    for target in re.findall(r"`?make (\w+)", README):
        made = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    from dsv4lab.cli import parser

    known = parser().format_help()
    commands = set(re.findall(r"bin/dsv4lab (\w+)", README))
    assert commands and all(command in known for command in commands)
