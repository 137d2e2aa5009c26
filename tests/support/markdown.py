"""The parts of a page that tests look at: code blocks, tables, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`([\w./-]+)`:\s*$")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``file``: the name that stands before it, as in "`queues.yaml`:"."""

    language: str
    text: str
    file: str | None


def blocks(page: Path, language: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        named = _FILE.search(text[: match.start()])
        found.append(Block(match[1], match[2], named[1] if named else None))
    return [block for block in found if language in (None, block.language)]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The fragment names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables(page: Path, first: str) -> list[dict[str, str]]:
    """The rows of every table whose first column is called ``first``; backquotes are left away."""
    rows: list[dict[str, str]] = []
    header: list[str] | None = None
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")]
        if header is None:
            header = cells
        elif header[0] == first and set(line) - set("|-: "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def commands(page: Path) -> list[str]:
    """Every command line of the page: those of bash blocks, and those that stand in the text in backquotes."""
    lines = [line for block in blocks(page, "bash") for line in block.text.splitlines()]
    return [line.partition(" #")[0].strip() for line in (*lines, *re.findall(r"`([^`\n]+)`", prose(page)))]
