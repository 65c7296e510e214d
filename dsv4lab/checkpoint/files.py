"""A folder of safetensors files seen as one table of tensors, read one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file and the tensor."""


@dataclass(frozen=True)
class Entry:
    """A tensor as its file's header describes it.

    Args:
        file: where it stands.
        name: as on disk.
        dtype: safetensors' word for it, such as "BF16".
        shape: as on disk.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: tensor {self.name} {what}")


class Checkpoint:
    """The tensors of a folder, by their names on disk.

    Args:
        directory: holds model.safetensors, or shards with model.safetensors.index.json.

    Attributes:
        entries: name -> Entry, in the order of the files.

    Raises:
        CheckpointError: no such folder, no safetensors in it, a truncated file, an index that lies.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such folder")
        self._open = {}
        self.entries: dict[str, Entry] = {}
        index = self.directory / INDEX
        if index.exists():
            self._read_index(index)
        else:
            self._read_folder()

    def read(self, entry: Entry) -> Tensor:
        """Read one tensor."""
        try:
            return self._handle(entry.file).get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise entry.error(f"cannot be read: {error}") from None

    def _read_folder(self) -> None:
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.directory}: no .safetensors file")
        for file in files:
            for name in self._handle(file).keys():  # noqa: SIM118 (no mapping)
                if name in self.entries:
                    raise self._entry(file, name).error(f"stands in {self.entries[name].file.name} as well")
                self.entries[name] = self._entry(file, name)

    def _read_index(self, index: Path) -> None:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{index}: needs a weight_map of tensor names to file names")
        present = {
            file: set(self._handle(self.directory / file).keys()) for file in sorted(set(where.values()))
        }
        for name, file in where.items():
            if name not in present[file]:
                raise CheckpointError(
                    f"{self.directory / file}: tensor {name} is missing, but {INDEX} has it here"
                )
            self.entries[name] = self._entry(self.directory / file, name)

    def _entry(self, file: Path, name: str) -> Entry:
        header = self._handle(file).get_slice(name)
        return Entry(file, name, header.get_dtype(), tuple(header.get_shape()))

    def _handle(self, file: Path):
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{file}: no such file") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: truncated, or no safetensors file ({error})") from None
        return self._open[file]


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: needs a JSON object, has a {type(content).__name__}")
    return content
