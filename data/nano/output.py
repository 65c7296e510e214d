"""What a training leaves behind: a checkpoint while it runs, the finished files at its end, each by rename.

Everything is written in the folder `.partial` below the destination. A killed run leaves that folder and
nothing else; a finished one moves its files out of it, the weights last, and removes it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsv4lab import checkpoint

FILES = ("trained_on.txt", "training_log.csv", "training.json", "config.json", "model.safetensors")
FORMAT = 1


class Destination:
    """The folder that receives the model.

    Args:
        folder: made if it is not there.
        resume: go on from the checkpoint that an unfinished run left here.
        overwrite: finished files, and a checkpoint, may be replaced.
    Raises:
        ValueError: it cannot be written, holds what may not be replaced, or nothing to resume from.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False, overwrite: bool = False):
        self.folder = Path(folder)
        self.partial = self.folder / ".partial"
        self.checkpoint = self.partial / "checkpoint.pt"
        present = [name for name in FILES if (self.folder / name).exists()]
        if present and not overwrite:
            raise ValueError(f"out: {self.folder / present[0]} exists already; --overwrite replaces it")
        if resume and not self.checkpoint.exists():
            raise ValueError(f"resume: there is no checkpoint {self.checkpoint}")
        if self.checkpoint.exists() and not resume and not overwrite:
            raise ValueError(f"out: {self.checkpoint} is of an unfinished run; --resume goes on with it, "
                             "--overwrite discards it")  # fmt: skip
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            probe = self.partial / "probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"out: cannot write in {self.folder}: {error.strerror}") from None

    def save_checkpoint(self, state: dict) -> None:
        """Replaces the checkpoint; one that is cut short never takes its place."""
        temporary = self.checkpoint.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.checkpoint)

    def load_checkpoint(self, device) -> dict:
        """Reads the checkpoint.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            state = torch.load(self.checkpoint, map_location=device, weights_only=True)
        except Exception as error:  # torch names no narrower class for a damaged file
            raise ValueError(f"resume: cannot read {self.checkpoint}: {error}") from None
        if state.get("format") != FORMAT:
            raise ValueError(f"resume: {self.checkpoint} is not a checkpoint of this script")
        return state

    def finish(self, config, state: dict, rows: list[dict], facts: dict, trained_on: str) -> None:
        """Writes all files, then moves them to their names."""
        try:
            checkpoint.save(config, state, self.partial, replace=True)
        except Exception:
            save_file(state, self.partial / "raw.safetensors")  # minutes of work, kept whatever went wrong
            raise
        _write(self.partial / "training_log.csv", _csv(rows))
        _write(self.partial / "training.json", json.dumps(facts, indent=2) + "\n")
        _write(self.partial / "trained_on.txt", trained_on)
        for name in FILES:
            os.replace(self.partial / name, self.folder / name)
        shutil.rmtree(self.partial)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
