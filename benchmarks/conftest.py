"""OpenRLHF's functions import on a CPU with the stand-ins in place."""

from __future__ import annotations

from recipes import cpu_shim

cpu_shim.install("openrlhf")
