"""The form of the notebooks: no outputs, text before code, short cells, exercises with solutions, asserts.

That they run is nbmake's to say, which collects them as tests of their own.
"""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST_CELL, MEDIAN_CELL, CELLS = 30, 8, (20, 30)


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    found = nbformat.read(request.param, as_version=4)
    nbformat.validate(found)
    return found


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"01_quantization", "07_decode"}


def test_nothing_is_stored_but_the_source(notebook):
    for cell in code_cells(notebook):
        assert cell.execution_count is None, "execution count is stored"
        assert cell.outputs == [], "outputs are stored"
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata


def test_text_stands_before_each_code_cell(notebook):
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            expected = (
                "exercise" in tags(before) if "solution" in tags(cell) else before.cell_type == "markdown"
            )
            assert expected, f"no text before: {cell.source[:60]}"


def test_cells_are_few_and_short(notebook):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    assert max(lengths) <= LONGEST_CELL
    assert statistics.median(lengths) <= MEDIAN_CELL
    shown = [cell for cell in notebook.cells if not {"exercise", "solution"} & set(tags(cell))]
    assert CELLS[0] <= len(shown) <= CELLS[1], f"{len(shown)} cells, stubs and solutions not counted"


def test_first_cell_has_title_takeaway_and_goals(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "**Takeaway:**" in first.source
    assert "At the end you can" in first.source and first.source.count("\n- ") >= 3
    assert notebook.cells[-1].cell_type == "markdown" and "## Recap" in notebook.cells[-1].source


def test_exercises_have_hidden_solutions_that_assert(notebook):
    exercises = [i for i, cell in enumerate(notebook.cells) if "exercise" in tags(cell)]
    assert len(exercises) >= 3
    for i in exercises:
        assert "raises-exception" in tags(notebook.cells[i])
        solution = notebook.cells[i + 1]
        assert tags(solution) == ["solution"]
        assert solution.metadata.jupyter.source_hidden is True
        assert asserts(solution.source), f"solution asserts nothing: {solution.source[:60]}"
    solutions = [i for i, cell in enumerate(notebook.cells) if "solution" in tags(cell)]
    assert solutions == [i + 1 for i in exercises]


def test_only_exercises_may_raise(notebook):
    for cell in code_cells(notebook):
        assert ("raises-exception" in tags(cell)) == ("exercise" in tags(cell))


def test_stubs_raise(notebook):
    """A stub that does not raise would pass unnoticed; each one is called in its own cell."""
    for cell in code_cells(notebook):
        if "exercise" in tags(cell):
            tree = ast.parse(cell.source)
            functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert len(functions) == 1
            last = functions[0].body[-1]
            assert isinstance(last, ast.Raise) and ast.unparse(last.exc) == "NotImplementedError"
            called = {
                n.func.id
                for n in ast.walk(tree.body[-1])
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            }
            assert functions[0].name in called or functions[0].name in ast.unparse(tree.body[-1])


def test_figures_and_asserts_carry_the_argument(notebook):
    shown = "\n".join(cell.source for cell in code_cells(notebook) if "solution" not in tags(cell))
    assert len(re.findall(r"plots\.(?!sqnr_db|round_trip)\w+\(", shown)) >= 4, (
        "fewer than four figures or tables"
    )
    assert asserts(shown) >= 4


def test_nothing_ends_or_skips_the_run(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"sys\.exit|pytest\.skip|^[!%]", cell.source, re.MULTILINE), cell.source[:60]
        assert "skip-execution" not in tags(cell)


def test_links_between_notebooks_exist(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(((?!https?://)[^)#]+)\)", text):
        assert (FOLDER / target).exists(), f"broken link: {target}"


def test_a_copy_elsewhere_finds_what_it_reads(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"""["'](\.\./|data/|notebooks/)""", cell.source), (
            f"use a constant such as checkpoint.NANO or table.KEPT: {cell.source[:60]}"
        )


def test_the_map_names_every_notebook():
    text = (FOLDER / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.name})" in text


def asserts(source: str) -> int:
    return sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))
