"""The split of a standard library: deterministic, disjoint, and deaf to what was trained on."""

from __future__ import annotations

import lzma
import sys
from hashlib import sha256

import pytest

from dsv4lab import corpus
from dsv4lab.corpus import LibraryFile


@pytest.fixture
def library(tmp_path):
    """A small library: 200 modules, as many tests, and things that are no library source."""
    root = tmp_path / "library"
    for i in range(200):
        for path in (f"pack{i % 7}/mod{i}.py", f"test/test_{i}.py", f"pack{i % 7}/tests/case{i}.py"):
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"# {path}\nvalue = {i * i}\n" * (1 + i % 5))
    for path in ("site-packages/torch.py", "__pycache__/a.py", "config-3.11-x86_64/python-config.py",
                 "_sysconfigdata__linux_.py", "readme.txt", "dist-packages/x/y.py"):  # fmt: skip
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("# not ours\n")
    (root / "linked.py").symlink_to(root / "pack1" / "mod1.py")
    return root


def write_list(path, files):
    path.write_text(corpus.trained_on_text(files))
    return path


def test_held_out_is_the_hash_of_the_path_modulo_twenty():
    # The last three stand as coreutils' sha256sum and bc gave them: ac07040adff09758 modulo 20 is 0.
    for path in ("operator.py", "runpy.py", "json/decoder.py", "argparse.py", "asyncio/locks.py"):
        assert corpus.is_held_out(path) == (int(sha256(path.encode()).hexdigest()[:16], 16) % 20 == 0)
    assert corpus.is_held_out("operator.py")
    assert corpus.is_held_out("asyncio/locks.py")
    assert not corpus.is_held_out("argparse.py")


def test_split_is_disjoint_complete_and_the_same_every_time(library):
    files = corpus.library_files(library)
    train = {f.path for f in corpus.training_files(files)}
    held = {f.path for f in files if f.held_out}
    assert len(files) == 600
    assert not train & held
    assert train | held == {f.path for f in files}
    assert 10 <= len(held) <= 60  # mean 30, standard deviation 5.3
    assert [f.path for f in files] == sorted(f.path for f in files)
    assert corpus.library_files(library) == files


def test_no_file_from_outside_the_library_is_read(library):
    assert not any(b"not ours" in f.data for f in corpus.library_files(library))
    assert "linked.py" not in {f.path for f in corpus.library_files(library)}


def test_tests_are_trained_on_but_never_evaluated(library):
    files = corpus.library_files(library)
    assert any(f.is_test for f in corpus.training_files(files))
    assert any(f.is_test for f in files if f.held_out)
    evaluated, _ = corpus.evaluation_files(files)
    assert evaluated
    assert not any(f.is_test for f in evaluated)
    assert corpus.is_test("idlelib/idle_test/test_x.py")
    assert corpus.is_test("test/support/__init__.py")
    assert not corpus.is_test("unittest/case.py")
    assert not corpus.is_test("test.py")


def test_a_file_that_moved_after_training_is_skipped_by_its_content(library, tmp_path):
    files = corpus.library_files(library)
    listed = write_list(tmp_path / "trained_on.txt", corpus.training_files(files))
    clean = corpus.evaluation_text(library, listed)
    assert clean.skipped == ()
    known = corpus.training_files(files)[0]
    victim = clean.files[0].path
    (library / victim).write_bytes(known.data)
    after = corpus.evaluation_text(library, listed)
    assert after.skipped == (victim,)
    assert victim not in {f.path for f in after.files}
    assert after.bytes == clean.bytes - len(clean.files[0].data)
    assert "1 skipped" in str(after)


def test_the_running_python_has_text_to_evaluate(tmp_path):
    text = corpus.evaluation_text(trained_on=write_list(tmp_path / "none.txt", []))
    assert text.python == ".".join(map(str, sys.version_info[:3]))
    assert text.bytes > 50_000
    assert text.python in str(text)
    assert f"{text.bytes:,} bytes" in str(text)
    assert not any(f.is_test or not f.held_out for f in text.files)
    assert 1.0 < text.xz_bits_per_byte < 3.0


def test_xz_is_of_the_concatenation_in_sorted_order():
    a, b = LibraryFile("b.py", b"second " * 50), LibraryFile("a.py", b"first " * 50)
    assert corpus.xz_bytes([a, b]) == corpus.xz_bytes([b, a])
    assert corpus.xz_bytes([a, b]) == len(lzma.compress(b.data + a.data, preset=9))


@pytest.mark.parametrize("context, overlap", [(8, 4), (8, 0), (8, 7), (16, None), (1000, 500), (1, 0)])
def test_windows_judge_every_byte_once_with_all_the_context_promised(context, overlap):
    data = bytes(range(1, 101))
    seen = []
    for w in corpus.windows([LibraryFile("a.py", data)], context, overlap):
        assert len(w.ids) <= context + 1
        assert w.first >= 1
        seen.append(w.ids[w.first :])
        if w.ids[0] == corpus.BEGIN:
            assert w.first == 1
        else:
            assert w.first == 1 + (context // 2 if overlap is None else overlap)
    assert b"".join(seen) == data


def test_windows_of_two_files_do_not_mix():
    files = [LibraryFile("a.py", b"abc"), LibraryFile("b.py", b"de")]
    assert [(w.ids, w.first) for w in corpus.windows(files, 8)] == [(b"\0abc", 1), (b"\0de", 1)]


@pytest.mark.parametrize("content", ["xyz\n", "0123456789abcde\n", "0123456789ABCDEF\n"])
def test_a_malformed_list_is_named(tmp_path, content):
    path = tmp_path / "trained_on.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"trained_on\.txt"):
        corpus.read_trained_on(path)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"library: .*nowhere"):
        corpus.library_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no Python source"):
        corpus.library_files(tmp_path)
    with pytest.raises(ValueError, match="missing"):
        corpus.read_trained_on(tmp_path / "missing")
    with pytest.raises(ValueError, match="overlap"):
        list(corpus.windows([], 8, 8))
