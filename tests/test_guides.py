"""The README and the guides: links lead somewhere, and files that are named exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A guide names files by their path below one of these, or below its own folder.
PACKAGES = [
    ROOT / folder
    for folder in (
        "",
        "adapters",
        "adapters/turret_adapters",
        "adapters/turret_adapters/formats",
        "clients/cli",
        "clients/python/turret_client",
        "server",
        "server/turret_server",
    )
]
GUIDES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]


def anchors(guide: Path) -> set[str]:
    """Headings as GitHub links them."""
    heads = re.findall(r"^#+ (.*)$", guide.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(guide):
    for target in re.findall(r"\]\(([^)]+)\)", guide.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (guide.parent / path).resolve() if path else guide
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_files_that_are_named_exist(guide):
    for path in re.findall(r"`([\w./]+/\w+\.(?:py|md|proto|toml))`", guide.read_text()):
        ours = not path.startswith("google/")
        assert not ours or any((folder / path).exists() for folder in (guide.parent, *PACKAGES)), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
