"""What the package's metadata takes from the address of the repository, which stands in pyproject.

Links of README lead to files beside it, as GitHub wants them; PyPI needs them whole.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s]+)(?=\))")
PICTURES = (".svg", ".png")


class AddressHook(MetadataHookInterface):
    """Fills in ``urls`` and ``readme``."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        address = self.config["address"]
        metadata["urls"] = {
            "Repository": address,
            "Documentation": f"{address}/blob/main/docs/index.md",
            "Issues": f"{address}/issues",
            "Changelog": f"{address}/blob/main/CHANGELOG.md",
        }
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": LINK.sub(lambda link: whole(link[1], address), readme),
        }


def whole(link: str, address: str) -> str:
    """A link of README as PyPI needs it: to a page of the repository, or to a picture's bytes."""
    if link.startswith("../../"):  # a page of the repository that is no file, its Actions say
        return f"{address}/{link.removeprefix('../../')}"
    return f"{address}/{'raw' if link.endswith(PICTURES) else 'blob'}/main/{link}"
