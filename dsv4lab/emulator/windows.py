"""Where the spaces lie among generic addresses; all else is the process's own memory."""

from __future__ import annotations

# Generic addresses at which a lane sees the shared memory of its CTA and cluster, and its own local memory.
SHARED_WINDOW = 1 << 60
LOCAL_WINDOW = 1 << 61
