"""What every test and notebook runs under: hardware gates, and a wake-up that is not lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

try:
    from nbclient.output_widget import OutputWidget
except ImportError:  # which notebooks need, and tests of kernels do not
    OutputWidget = None

# Before anything imports torch: threads that spin while waiting starve the other test processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# nbclient tells the kernel what an output widget shows, over the socket on which it awaits the cell's reply.
# Now and then that loses the reply's wake-up, and the cell seems to last until nbmake's time is over. The
# kernel need not be told.
if OutputWidget:
    OutputWidget.send = lambda *_, **__: None


def notebook_needs(path: Path) -> list[str]:
    """What a whole notebook needs, from its metadata, such as `"dsv4lab": {"needs": ["hopper"]}`."""
    return json.loads(path.read_text())["metadata"].get("dsv4lab", {}).get("needs", [])


def _unmet(item: pytest.Item) -> str | None:
    needs = notebook_needs(item.path) if item.path.suffix == ".ipynb" else []
    if item.get_closest_marker("gpu"):
        needs = [*needs, "cuda"]
    if not needs:
        return None
    from dsv4lab import device

    for need in needs:
        status = device.supports(need)
        if not status:
            return f"needs {need}: {status.reason}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := _unmet(item):
            item.add_marker(pytest.mark.skip(reason=reason))
