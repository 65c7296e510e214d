"""Every notebook in JupyterLab in a real browser: it runs, each control changes the figure, nothing fails.

`make test-browser` runs this. Pictures of every output in both themes are left in build/browser.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = ROOT / "build" / "browser"
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
RUN_SECONDS, REDRAW_SECONDS, QUIET_SECONDS = 300, 60, 1.5
CONTROLS = ".jp-Notebook .jupyter-widgets :is(.noUi-handle, select, input, textarea, button)"

SETTINGS = {  # no question about news, no look for updates
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

STATE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  if (!panel?.context?.isReady) return null;
  const cells = panel.content.widgets.map((cell) => cell.model).filter((model) => model.type === 'code');
  const shown = [...panel.node.querySelectorAll('.jupyter-widgets [data-mime-type$="stderr"]')];
  return {
    status: panel.sessionContext.session?.kernel?.status ?? 'none',
    left: cells.filter((model) => model.executionCount === null && model.sharedModel.source.trim()).length,
    errors: cells.filter((model) => !model.getMetadata('tags')?.includes('raises-exception'))
      .flatMap((model) => model.outputs.toJSON())
      .filter((output) => output.output_type === 'error')
      .map((output) => `${output.ename}: ${output.evalue}`),
    inWidgets: shown.map((node) => node.innerText),
    unrendered: [...panel.node.querySelectorAll('.jp-OutputArea-output')].map((node) => node.innerText)
      .filter((text) => /^(Error displaying widget|Loading widget|Explorer\\()/.test(text)),
  };
}"""

DRAWN = """(control) => [...control.closest('.jp-Cell').querySelectorAll(
  '.jupyter-widgets .jp-OutputArea-output, .widget-html, .widget-image')]
  .flatMap((node) => [node, ...node.querySelectorAll('img')])
  .map((node) => node.src ?? node.innerText).join('')"""

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium():
    """The path of a Chromium, or a skip that says how to get one."""
    found = subprocess.run([ROOT / ".ci" / "chromium"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    return found.stdout.strip()


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, its token, and the folder it shows."""

    url: str
    token: str
    folder: Path

    def page_of(self, name: str) -> str:
        return f"{self.url}lab/tree/{name}?reset&token={self.token}"


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """JupyterLab on copies of the notebooks, away from the repository and from the user's settings."""
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")
    for path in NOTEBOOKS:
        shutil.copy(path, folder)
    for name, values in SETTINGS.items():
        file = home / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    names = {"CONFIG_DIR": "config", "RUNTIME_DIR": "runtime", "DATA_DIR": "data"}
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}": str(home / value) for name, value in names.items()},
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_TOKEN": token,
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
        f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
    ]  # fmt: skip
    log = home / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        while not list((home / "runtime").glob("jpserver-*.json")):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Lab(f"http://127.0.0.1:{port}/", token, folder)
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser(chromium):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install 'dsv4lab[browser]'"
    )
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture
def open_notebook(lab, browser):
    """Opens a notebook by its file's name; returns the page. Its kernel ends with the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 1400})

    def call(name):
        page.goto(lab.page_of(name))
        page.wait_for_function(f"() => ({STATE})()?.status === 'idle'", timeout=90_000)
        return page

    yield call
    page.screenshot(path=PICTURES / "last.png")
    kernels = f"{lab.url}api/kernels"
    headers = {"Authorization": f"token {lab.token}"}
    for kernel in page.request.get(kernels, headers=headers).json():
        page.request.delete(f"{kernels}/{kernel['id']}", headers=headers)
    page.close()


def problems(page) -> list[str]:
    """What a reader would see go wrong, exercises' stubs left out."""
    state = page.evaluate(STATE)
    return [*state["errors"], *state["inWidgets"], *state["unrendered"]]


def run_all(page) -> None:
    """Runs all cells from the menu and waits for the last one."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    deadline = time.monotonic() + RUN_SECONDS
    while (state := page.evaluate(STATE))["left"] or state["status"] != "idle":
        assert not state["errors"], state["errors"]
        assert time.monotonic() < deadline, (
            f"{state['left']} cells have not run, the kernel is {state['status']}"
        )
        page.wait_for_timeout(300)


def redrawn(page, control, before: str) -> bool:
    """Waits until the control's figure has become another one, or the kernel has been idle for a while."""
    start = quiet = time.monotonic()
    now_drawn = before
    while (now := time.monotonic()) - quiet < QUIET_SECONDS:
        assert now - start < REDRAW_SECONDS, "the kernel does not become idle"
        page.wait_for_timeout(100)
        last_drawn, now_drawn = now_drawn, control.evaluate(DRAWN)
        if page.evaluate(STATE)["status"] != "idle":
            quiet = now
        elif now_drawn == last_drawn != before:  # twice the same: not half drawn
            return True
    return False


def slide_to(control, place: str) -> None:
    """Moves a slider from its lower end up to a value, by keys."""
    control.press("Home")
    for _ in range(500):
        if control.get_attribute("aria-valuenow") == place:
            return
        control.press("ArrowRight")
    raise AssertionError(f"the slider does not stop at {place}")


def ways_to_move(control):
    """Calls that each set the control to another place, at last to its first one."""
    kind = control.evaluate("(node) => node.className.includes('noUi') ? 'slider' : node.type")
    if kind == "slider":
        first = control.get_attribute("aria-valuenow")
        keys = [lambda key=key: control.press(key) for key in ("ArrowRight", "End", "Home")]
        return [*keys, lambda: slide_to(control, first)]
    if kind.startswith("select"):
        options = control.locator("option").count()
        chosen = control.evaluate("(node) => node.selectedIndex")
        return [lambda i=i: control.select_option(index=i) for i in (*range(options), chosen)]
    if kind in ("button", "submit", "radio"):
        return [control.click]
    if kind == "checkbox":
        return [control.click] * 2
    if kind == "number":
        value = float(control.input_value())
        return [
            lambda v=v: (control.fill(f"{v:g}"), control.press("Enter"))
            for v in (value + 1, value - 1, value)
        ]
    raise AssertionError(f"no way to move a control of type {kind}")


def move(page, control) -> list[str]:
    """Moves a control through its places; returns what went wrong."""
    control.scroll_into_view_if_needed()
    name = control.evaluate("(node) => node.closest('.widget-inline-hbox')?.innerText ?? node.innerText")
    changed, found = False, []
    for way in ways_to_move(control):
        before = control.evaluate(DRAWN)
        way()
        changed |= redrawn(page, control, before)
        found += problems(page)
    return found if changed else [*found, f"moving {name!r} changes nothing"]


def take_pictures(page, folder: Path) -> int:
    """Saves every cell that has an output, once in each theme; returns how many cells those are."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    cells = page.locator(".jp-Notebook .jp-CodeCell:not(.jp-mod-noOutputs)")
    for theme, name in THEMES.items():
        page.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
        page.wait_for_selector(f"body[data-jp-theme-name='{name}']", state="attached")
        page.wait_for_selector("#jupyterlab-splash", state="detached")
        for i in range(cells.count()):
            cells.nth(i).screenshot(path=folder / f"{i:02}-{theme}.png")
    return cells.count()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_controls_change_the_figures(path, open_notebook):
    page = open_notebook(path.name)
    run_all(page)
    try:
        assert not problems(page)
        source = path.read_text()
        controls = page.locator(CONTROLS)
        assert controls.count() or "widgets." not in source, "its widgets do not show"
        for i in range(controls.count()):
            assert not move(page, controls.nth(i))
    finally:
        assert take_pictures(page, PICTURES / path.stem)


# ---- that the test can fail

GOOD = "widgets.explore(lambda n: plots.Table('n', [[n]]), n=widgets.choice('n', [1, 2]))"
BROKEN = {
    "changes nothing": "widgets.explore(lambda n: plots.Table('n', [[0]]), n=widgets.choice('n', [1, 2]))",
    "ZeroDivisionError": "widgets.explore(lambda n: plots.Table('n', [[1 / n]]), n=widgets.menu('', [1, 0]))",
}


def made_notebook(folder: Path, *cells: str) -> str:
    """The name of a notebook made of code cells."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in ("from dsv4lab import plots, widgets", *cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "made.ipynb")
    return "made.ipynb"


def test_a_broken_control_is_seen(lab, open_notebook):
    page = open_notebook(made_notebook(lab.folder, GOOD, *BROKEN.values()))
    run_all(page)
    good, still, raising = (page.locator(CONTROLS).nth(i) for i in range(3))
    assert not move(page, good)
    for control, message in zip((still, raising), BROKEN, strict=True):
        assert message in "".join(move(page, control))


def test_a_failing_cell_is_seen(lab, open_notebook):
    page = open_notebook(made_notebook(lab.folder, "1 / 0", GOOD))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_all(page)
