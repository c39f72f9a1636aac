"""Every relative link in a Markdown file of the repository leads to a file that exists, and to a heading in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]

LINK = re.compile(
    r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)"  # [text](target "title")
    r"|<img[^>]*\ssrc=\"([^\"]+)\""
)


def list_pages() -> list[Path]:
    """Markdown files that git keeps, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\0")
    # The README of a version is written by the program and read where the version lies.
    return [ROOT / name for name in listed if name and not name.startswith("tests/data/")]


def strip_code(text: str) -> str:
    """Without what is shown as code."""
    text = re.sub(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^\1\2[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "``", text)


def list_anchors(text: str) -> set[str]:
    """What links after '#' may name: headings as GitHub and mkdocs write them, and explicit ids."""
    anchors: dict[str, int] = {}
    found = set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", text)) | set(re.findall(r"\{#([\w-]+)\}", text))
    fenced = re.sub(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^\1\2[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", fenced, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        count = anchors.get(slug, 0)
        anchors[slug] = count + 1
        found |= {slug if not count else f"{slug}-{count}", re.sub(r"-{2,}", "-", slug)}
    return found


def find_broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    broken = []
    for groups in LINK.findall(strip_code(page.read_text(encoding="utf-8"))):
        target = unquote(groups[0] or groups[1])
        if re.match(r"[a-z][a-z0-9+.-]*:", target, flags=re.IGNORECASE) or target.startswith("//"):
            continue
        name, _, anchor = target.partition("#")
        path = page if not name else (page.parent / name).resolve()
        if not path.exists():
            broken.append(f"{target}: there is no such file")
        elif anchor and path.suffix == ".md" and anchor not in list_anchors(path.read_text(encoding="utf-8")):
            broken.append(f"{target}: there is no such heading")
    return broken


def test_there_are_pages_and_links_to_check():
    assert sum(len(LINK.findall(strip_code(page.read_text(encoding="utf-8")))) for page in list_pages()) > 50


@pytest.mark.parametrize("page", list_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert not find_broken(page)


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n\n[a](page.md) [b](#one-two) [c](gone.md) [d](#three) [e](https://x.org/gone) `[f](gone.md)`\n"
        '```\n[g](gone.md)\n```\n![h](gone.png) <img src="gone.jpg">\n',
        encoding="utf-8",
    )
    assert [line.split(":")[0] for line in find_broken(page)] == ["gone.md", "#three", "gone.png", "gone.jpg"]
