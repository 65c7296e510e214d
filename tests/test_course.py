"""Copies of the notebooks with and without solutions, which run anywhere, and pages of them."""

from __future__ import annotations

import re
import symtable
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dsv4lab import course
from dsv4lab.cli import main

STUB = new_code_cell("def f():\n    raise NotImplementedError\n\n\nf()")
STUB.metadata["tags"] = ["exercise", "raises-exception"]
SOLUTION = new_code_cell("def f():\n    return 1\n\n\nassert f() == 1\nprint('solved')")
SOLUTION.metadata.update(tags=["solution"], jupyter={"source_hidden": True})
LINKS = "[two](b.ipynb#part), [map](README.md), [code](../code.py), [web](https://example.org), [x](#y)"
MARKDOWN = f"# 1. One\n\n{LINKS}"
WIDGET = (
    "from dsv4lab import plots, widgets\n"
    "widgets.explore(lambda n: plots.Table(['head'], [[n]]), n=widgets.choice('n', [7, 8]))"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two small notebooks and their map."""
    found = tmp_path_factory.mktemp("course")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    cells = [new_markdown_cell(MARKDOWN), new_code_cell(WIDGET), STUB, SOLUTION]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), found / "a.ipynb")
    cells = [new_markdown_cell("# 2. Two <&>\n\n$x^2$"), new_code_cell("print('<&>')")]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), found / "b.ipynb")
    (found / "README.md").write_text("# Map\n\n[first](a.ipynb) and [more](../data/README.md)\n")
    return found


@pytest.fixture(scope="module")
def book(folder, tmp_path_factory):
    """The folder of pages, and what progress was told."""
    target, told = tmp_path_factory.mktemp("book"), []
    files = course.write_book(target, progress=lambda *step: told.append(step), folder=folder)
    assert [file.name for file in files] == ["index.html", "a.html", "b.html"]
    assert told == [(0, 2, "a"), (1, 2, "b")]
    return target


def sources(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells]


# ---- copies


def test_hidden_solutions_are_gone_and_stubs_stay(folder, tmp_path):
    files = course.copy(tmp_path / "new", "hidden", folder)
    assert sorted(files) == sorted((tmp_path / "new").iterdir()) and len(files) == 3
    copied = nbformat.read(tmp_path / "new" / "a.ipynb", as_version=4)
    nbformat.validate(copied)
    assert sources(copied)[1:] == [WIDGET, STUB.source]
    assert all("solved" not in file.read_text() for file in files)


@pytest.mark.parametrize(("solutions", "folded"), [("folded", True), ("shown", False)])
def test_solutions_are_folded_or_shown(folder, tmp_path, solutions, folded):
    course.copy(tmp_path, solutions, folder)
    copied = nbformat.read(tmp_path / "a.ipynb", as_version=4)
    assert sources(copied)[1:] == [WIDGET, STUB.source, SOLUTION.source]
    assert copied.cells[-1].metadata.get("jupyter", {}).get("source_hidden", False) is folded
    assert copied.cells[-1].metadata.tags == ["solution"]


def test_links_that_lead_out_of_the_copy_become_text(folder, tmp_path):
    course.copy(tmp_path, folder=folder)
    text = nbformat.read(tmp_path / "a.ipynb", as_version=4).cells[0].source
    assert text == MARKDOWN.replace("[code](../code.py)", "code")
    assert (tmp_path / "README.md").read_text() == "# Map\n\n[first](a.ipynb) and more\n"


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "b.ipynb").write_text("a learner's work")
    with pytest.raises(ValueError, match=r"b\.ipynb is there already"):
        course.copy(tmp_path, folder=folder)
    assert [file.name for file in tmp_path.iterdir()] == ["b.ipynb"]


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no notebooks; they come with the repository"):
        course.read(folder=tmp_path)
    with pytest.raises(ValueError, match="solutions must be one of folded, hidden, shown, got 'none'"):
        course.read("none")


# ---- pages


class Page(HTMLParser):
    """What a page would load, where its links lead, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.links, self.details, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "a":
            self.links.append(given.get("href", ""))
        else:
            self.loads += [given[name] for name in ("src", "href") if given.get(name)]
        if tag == "details":
            self.details.append("open" in given)

    def handle_data(self, data):
        self.text += data


def read_page(folder, name) -> Page:
    return Page((folder / name).read_text(encoding="utf-8"))


def test_pages_load_nothing_from_elsewhere(book):
    for name in ("index.html", "a.html"):
        text = (book / name).read_text(encoding="utf-8")
        assert all(load.startswith("data:") for load in Page(text).loads)
        assert not re.search(r"url\(['\"]?(?!['\"]?data:)[\w./]|@import|\bimport .*http", text)
    assert any("mathjax" in load.lower() for load in read_page(book, "b.html").loads)  # for TeX, from the web


def test_pages_link_to_each_other(book):
    links = {link for link in read_page(book, "a.html").links if not link.startswith("#")}
    assert links == {"b.html#part", "index.html", "https://example.org"}
    index = read_page(book, "index.html")
    assert "a.html" in index.links and not any("data" in link for link in index.links)
    assert "sliders stand still" in index.text


def test_pages_show_the_outputs(book):
    found = read_page(book, "a.html")
    assert "head" in found.text and "7" in found.text and "Explorer(" not in found.text
    assert "solved" in found.text and found.details == [False]
    assert "NotImplementedError" in found.text and "Traceback" not in found.text
    assert "<&>" in read_page(book, "b.html").text
    assert "<title>2. Two &lt;&amp;&gt;</title>" in (book / "b.html").read_text(encoding="utf-8")


def test_a_page_with_solutions_shown_has_them_open(folder):
    notebook = course.read("shown", folder)["a.ipynb"]
    assert Page(course.page(notebook, "t")).details == [True]
    assert Page(course.page(course.read("hidden", folder)["a.ipynb"], "t")).details == []


def test_a_failing_cell_is_said(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path / "c.ipynb")
    with pytest.raises(ValueError, match=r"c\.ipynb: a cell failed: ZeroDivisionError: division by zero"):
        course.write_book(tmp_path, folder=tmp_path)


# ---- the command, on the notebooks themselves


def test_the_command_writes_a_learners_copy(tmp_path, capsys):
    assert main(["notebooks", "--hide-solutions", str(tmp_path / "class")]) == 0
    assert "README.md" in capsys.readouterr().err
    copied = course.read(folder=tmp_path / "class")
    assert list(copied) == list(course.read())
    for name, notebook in course.read().items():
        left = [cell.source for cell in notebook.cells if cell.cell_type == "code"
                and cell.metadata.get("tags") != ["solution"]]  # fmt: skip
        assert [cell.source for cell in copied[name].cells if cell.cell_type == "code"] == left
    assert main(["notebooks", str(tmp_path / "class")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["notebooks", "--hide-solutions", "--show-solutions", "x"]) == 2


@pytest.mark.parametrize("name", sorted(course.read()))
def test_no_other_cell_needs_what_a_solution_defines(name):
    """A learner's copy has no solutions and runs all the same."""
    given, solved = set(), set()
    for cell in course.read()[name].cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "exercise" not in tags:
            stored, loaded = names(cell.source)
            if "solution" in tags:
                solved |= stored - given
            else:
                given |= stored
                assert not loaded & solved - given, f"{loaded & solved - given} come from a solution"


def names(source: str) -> tuple[set[str], set[str]]:
    """The global names that a cell sets, and those that it reads, functions' bodies included."""
    top = symtable.symtable(source, "cell", "exec")
    stored = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    loaded, tables = {s.get_name() for s in top.get_symbols() if s.is_referenced()}, [*top.get_children()]
    while tables:
        table = tables.pop()
        loaded |= {s.get_name() for s in table.get_symbols() if s.is_global()}
        tables += table.get_children()
    return stored, loaded


def test_names_of_a_cell():
    source = "import a\n[b for b in c]\ndef d(e, f=g):\n    return e + h\nd(i=j)\nk = lambda l: l + m"
    assert names(source) == ({"a", "d", "k"}, {"c", "d", "g", "h", "j", "m"})


def run_in(folder, name):
    """Runs a notebook as a learner does who has copied it alone to an empty folder."""
    notebook = course.read()[name]
    course.execute(notebook, name, folder)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_a_notebook_runs_in_an_empty_folder(tmp_path):
    run_in(tmp_path, "05_grouped_wo_a.ipynb")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(course.read()))
def test_every_notebook_runs_in_an_empty_folder(tmp_path, name):
    run_in(tmp_path, name)
