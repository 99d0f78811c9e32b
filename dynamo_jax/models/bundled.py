"""Where the small model that comes with the package lies; see its README.md for the model card."""

from __future__ import annotations

from pathlib import Path

BUNDLED_NAME = "tiny-moe"
BUNDLED = Path(__file__).parent / "tiny_moe"
