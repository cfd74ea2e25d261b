"""Two processes of this machine, as the ranks of one job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def on_two_ranks(module: str, folder: Path, *words: str) -> Any:
    """What ``python -m module WORDS... OUT.pt`` saves there, run as either rank in ``folder``."""
    out = folder / "out.pt"
    own = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")]),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-W", "ignore", "-m", module, *words, str(out)]
    ranks = [
        subprocess.Popen(command, cwd=folder, env=own | {"RANK": str(rank)}) for rank in range(2)
    ]
    ended = [rank.wait(300) for rank in ranks]
    assert ended == [0, 0], f"the ranks ended with {ended}"
    return torch.load(out, weights_only=False)
