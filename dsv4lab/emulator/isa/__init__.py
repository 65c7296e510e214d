"""The instruction set: importing it registers every instruction."""

from __future__ import annotations

import importlib
import pkgutil
import sys

for _module in pkgutil.iter_modules(__path__):
    try:
        importlib.import_module(f"{__name__}.{_module.name}")
    except Exception as error:  # DEVELOPMENT ONLY
        print("isa:", _module.name, error, file=sys.stderr)
