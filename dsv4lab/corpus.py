"""The text that trains and judges the nano model: a Python standard library, split by file.

Every Python ships the same kind of text, so nothing needs to be copied into the repository. A file is
held out when the hash of its path relative to the library says so: the split needs no list, does not
depend on the machine, and a file that keeps its path stays on its side from one Python to the next.
A file may also move, so evaluation skips every held-out file whose content was trained on.
"""

from __future__ import annotations

import hashlib
import lzma
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

HELD_OUT_ONE_IN = 20
"""One file in twenty (5 %) is held out."""

BEGIN = 0
"""The byte that stands before each file, so that the first byte of a file has something to follow."""

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
"""A file below a folder of one of these names is a test: trained on, never evaluated."""

LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")  # written by the build: they tell of its machine
DIGEST_CHARS = 16
TRAINED_ON = Path(__file__).resolve().parent.parent / "data" / "nano" / "trained_on.txt"


@dataclass(frozen=True)
class LibraryFile:
    """One source file of a standard library.

    Args:
        path: relative to the library, with forward slashes.
        data: its bytes.
    """

    path: str
    data: bytes = field(repr=False)

    @property
    def held_out(self) -> bool:
        return is_held_out(self.path)

    @property
    def is_test(self) -> bool:
        return is_test(self.path)

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 of the content."""
        return hashlib.sha256(self.data).hexdigest()[:DIGEST_CHARS]


@dataclass(frozen=True)
class EvaluationText:
    """The held-out files that a model which was trained elsewhere may be judged on.

    Args:
        files: in sorted order of their paths.
        python: version of the running Python when its own library was read, else None.
        root: the library folder.
        skipped: paths left out because their content was trained on.
    """

    files: tuple[LibraryFile, ...]
    python: str | None
    root: Path
    skipped: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(len(f.data) for f in self.files)

    @property
    def xz_bits_per_byte(self) -> float:
        return 8 * xz_bytes(self.files) / self.bytes

    def __str__(self) -> str:
        source = f"Python {self.python}" if self.python else str(self.root)
        return (
            f"{len(self.files)} held-out files of the library of {source}, {self.bytes:,} bytes; "
            f"{len(self.skipped)} skipped because their content was trained on"
        )


def is_held_out(path: str) -> bool:
    """Whether a file is held out: the first 8 bytes of its path's SHA-256, big-endian, are 0 modulo 20."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def is_test(path: str) -> bool:
    """Whether a file stands below a folder of tests, which some distributions of Python drop."""
    return not TEST_FOLDERS.isdisjoint(PurePosixPath(path).parts[:-1])


def is_source(path: str) -> bool:
    """Whether a file is the library's own source: `*.py`, not installed on top, not written by the build."""
    parts = PurePosixPath(path).parts
    return (
        path.endswith(".py")
        and LEFT_OUT_FOLDERS.isdisjoint(parts[:-1])
        and not any(part.startswith(LEFT_OUT_PREFIXES) for part in parts)
    )


def library_root() -> Path:
    """The standard library folder of the running Python."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(root: str | Path | None = None) -> list[LibraryFile]:
    """Reads the source files of a standard library, sorted by path.

    Args:
        root: the library folder; None for the running Python's.
    Returns:
        the files, symbolic links left out (distributions link files of their own into the library).
    Raises:
        ValueError: the folder does not exist or holds no source file.
    """
    folder = library_root() if root is None else Path(root)
    if not folder.is_dir():
        raise ValueError(f"library: {folder} is not a folder")
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.py")}
    files = [
        LibraryFile(path, found[path].read_bytes())
        for path in sorted(found)
        if is_source(path) and found[path].is_file() and not found[path].is_symlink()
    ]
    if not files:
        raise ValueError(f"library: no Python source file in {folder}")
    return files


def training_files(files: Iterable[LibraryFile]) -> list[LibraryFile]:
    """The files to train on: all that are not held out, tests among them, empty ones aside."""
    return [f for f in files if not f.held_out and f.data]


def evaluation_files(
    files: Iterable[LibraryFile], trained_on: frozenset[str] = frozenset()
) -> tuple[list[LibraryFile], list[str]]:
    """The held-out files that are neither tests nor empty nor known, and the paths of the known ones.

    Args:
        files: of one library.
        trained_on: digests of contents that were trained on.
    """
    held = [f for f in files if f.held_out and not f.is_test and f.data]
    return [f for f in held if f.digest not in trained_on], [f.path for f in held if f.digest in trained_on]


def evaluation_text(root: str | Path | None = None, trained_on: str | Path = TRAINED_ON) -> EvaluationText:
    """The text that evaluation uses: held-out files of the running Python's library, or of the one at `root`.

    Args:
        root: a library folder; None for the running Python's.
        trained_on: the list of trained-on digests that ships with the model.
    Raises:
        ValueError: no such library or list, a malformed list, or nothing left to evaluate.
    """
    files, skipped = evaluation_files(library_files(root), read_trained_on(trained_on))
    if not files:
        raise ValueError(f"library: no held-out file is left in {root or library_root()}")
    python = platform.python_version() if root is None else None
    return EvaluationText(tuple(files), python, Path(root or library_root()), tuple(skipped))


def read_trained_on(path: str | Path = TRAINED_ON) -> frozenset[str]:
    """Reads a list of trained-on contents: one digest of 16 hex digits a line."""
    try:
        lines = Path(path).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"trained_on: cannot read {path}: {error}") from error
    for line in lines:
        if len(line) != DIGEST_CHARS or not set(line) <= set("0123456789abcdef"):
            raise ValueError(
                f"trained_on: {path} holds {line[:40]!r}, needs {DIGEST_CHARS} hex digits a line"
            )
    return frozenset(lines)


def trained_on_text(files: Iterable[LibraryFile]) -> str:
    """The list of trained-on contents as `read_trained_on` reads it, sorted."""
    return "".join(f"{digest}\n" for digest in sorted({f.digest for f in files}))


def xz_bytes(files: Iterable[LibraryFile]) -> int:
    """What `xz -9` needs for the files concatenated in sorted order of their paths, in bytes."""
    joined = b"".join(f.data for f in sorted(files, key=lambda f: f.path))
    return len(lzma.compress(joined, preset=9))


@dataclass(frozen=True)
class Window:
    """A piece of a file to run a model on: it reads ids[:-1] and is judged on ids[first:].

    Args:
        ids: at most context + 1 bytes, `BEGIN` first when the piece opens its file.
        first: index of the first byte to judge, at least 1; earlier ones are context only.
    """

    ids: bytes = field(repr=False)
    first: int


def windows(
    files: Iterable[LibraryFile], context: int = 2048, overlap: int | None = None
) -> Iterator[Window]:
    """Cuts each file into windows so that every byte is judged exactly once.

    Args:
        files: each is read on its own, from `BEGIN` on.
        context: most positions that the model reads at once.
        overlap: positions of a window that repeat the one before, as context only; None for half the context.
    Raises:
        ValueError: context below 1, or overlap outside 0 .. context - 1.
    """
    overlap = context // 2 if overlap is None else overlap
    if context < 1 or not 0 <= overlap < context:
        raise ValueError(f"overlap: got {overlap} of context {context}, needs 0 <= overlap < context")
    for file in files:
        ids = bytes([BEGIN]) + file.data
        judged = 1
        while judged < len(ids):
            start = max(0, judged - 1 - overlap)
            stop = min(len(ids), start + context + 1)
            yield Window(ids[start:stop], judged - start)
            judged = stop
