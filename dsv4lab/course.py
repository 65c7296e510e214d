"""The notebooks as a course: copies to hand out, with or without solutions, and a book in HTML."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
MAP = "README.md"
SOLUTIONS = ("folded", "hidden", "shown")
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_SECONDS = 600

TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js_requirejs -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- if nb.metadata.get('math') -%}{{ super() }}{%- endif -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
main { max-width: 1000px; margin: auto }
summary { margin-left: 80px; cursor: pointer; color: var(--jp-content-link-color) }
</style>
{%- endblock -%}
{%- block codecell -%}
{%- if 'solution' in cell.metadata.get('tags', []) -%}
<details{% if not cell.metadata.get('jupyter', {}).get('source_hidden') %} open{% endif %}>
<summary>Solution</summary>
{{ super() }}
</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
"""
"""nbconvert's page, with solutions to unfold, and without what it would load from elsewhere.

MathJax is loaded for formulas in TeX alone.
"""


def read(solutions: str = "folded", folder: Path = FOLDER) -> dict[str, NotebookNode]:
    """The notebooks of a folder by their files' names, in order.

    Args:
        solutions: `folded`, as they are; `hidden` leaves them out, `shown` unfolds them. The stubs stay.
        folder: where the notebooks lie.

    Raises:
        ValueError: there are no notebooks, or `solutions` is none of these.
    """
    if solutions not in SOLUTIONS:
        raise ValueError(f"solutions must be one of {', '.join(SOLUTIONS)}, got {solutions!r}")
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise ValueError(f"{folder}: no notebooks; they come with the repository, not with a wheel")
    found = {path.name: nbformat.read(path, as_version=4) for path in paths}
    for notebook in found.values():
        if solutions == "hidden":
            notebook.cells = [cell for cell in notebook.cells if "solution" not in _tags(cell)]
        elif solutions == "shown":
            for cell in notebook.cells:
                if "solution" in _tags(cell):
                    cell.metadata.pop("jupyter", None)
    return found


def copy(target: Path, solutions: str = "folded", folder: Path = FOLDER) -> list[Path]:
    """Writes the notebooks and their map into a folder from which they run as well.

    Links to files that are not copied become plain text.

    Returns:
        the files written.

    Raises:
        ValueError: see `read`; or a file is there already, and nothing is written.
    """
    notebooks = read(solutions, folder)
    files = [target / name for name in (*notebooks, MAP)]
    if there := [file for file in files if file.exists()]:
        raise ValueError(f"{there[0]} is there already; name another folder")
    target.mkdir(parents=True, exist_ok=True)
    for name, notebook in notebooks.items():
        _relink(notebook, {*notebooks, MAP})
        nbformat.write(notebook, target / name)
    (target / MAP).write_text(relinked(_map(folder), {*notebooks, MAP}), encoding="utf-8")
    return files


def write_book(
    target: Path,
    solutions: str = "folded",
    progress: Callable[[int, int, str], None] | None = None,
    folder: Path = FOLDER,
) -> list[Path]:
    """Runs the notebooks and writes each as an HTML page, with the map as index.html.

    Pages need no server and no network. Where the notebook has a slider, a page has its first figure.

    Args:
        target: folder for the pages; older ones are replaced.
        solutions: as in `read`.
        progress: called with the number of pages done, of all, and the next one's name.
        folder: where the notebooks lie; they run in it.

    Returns:
        the pages, the index first.

    Raises:
        ValueError: see `read`; or a cell failed.
    """
    notebooks = read(solutions, folder)
    pages = {name: f"{Path(name).stem}.html" for name in notebooks} | {MAP: "index.html"}
    target.mkdir(parents=True, exist_ok=True)
    for i, (name, notebook) in enumerate(notebooks.items()):
        if progress:
            progress(i, len(notebooks), Path(name).stem)
        execute(notebook, name, folder)
        _relink(notebook, pages)
        (target / pages[name]).write_text(page(notebook, _title(notebook)), encoding="utf-8")
    text = f"{relinked(_map(folder), pages)}\n\nOn these pages sliders stand still; in JupyterLab they move."
    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    (target / pages[MAP]).write_text(page(index, _title(index)), encoding="utf-8")
    return [target / pages[MAP], *(target / pages[name] for name in notebooks)]


def execute(notebook: NotebookNode, name: str, folder: Path) -> None:
    """Fills in a notebook's outputs, as pages show them: figures for widgets, stubs' errors in one line."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbclient.output_widget import OutputWidget

    class Mute(OutputWidget):
        """Does not tell the kernel what it shows: now and then that loses the wake-up of a cell's reply."""

        def send(self, *_, **__) -> None:
            pass

    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(folder)}})
    client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": Mute}}
    try:
        client.execute()
    except CellExecutionError as error:
        raise ValueError(f"{name}: a cell failed: {error.ename}: {error.evalue}") from error
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
            if output.output_type == "error":
                output.traceback = output.traceback[-1:]


def page(notebook: NotebookNode, title: str) -> str:
    """A notebook with its outputs as an HTML page."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    notebook.metadata["title"] = title
    markdown = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    notebook.metadata["math"] = any("$" in source for source in markdown)
    loader = DictLoader({"page.html.j2": TEMPLATE})
    exporter = HTMLExporter(extra_loaders=[loader], template_file="page.html.j2", embed_images=True)
    return exporter.from_notebook_node(notebook)[0]


def relinked(text: str, known: Any) -> str:
    """Markdown whose links work next to the files in `known` alone; a mapping also renames them.

    Links to other pages on the web stay; of one to any other file only its text stays.
    """

    def link(match: re.Match) -> str:
        label, target = match.groups()
        file, hash_, part = target.partition("#")
        if re.match(r"\w+:", target) or not file:
            return match[0]
        if file in known:
            return f"[{label}]({known[file] if isinstance(known, dict) else file}{hash_}{part})"
        return label

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def _relink(notebook: NotebookNode, known: Any) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relinked(cell.source, known)


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _map(folder: Path) -> str:
    return (folder / MAP).read_text(encoding="utf-8")


def _title(notebook: NotebookNode) -> str:
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")
