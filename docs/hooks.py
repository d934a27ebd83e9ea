"""How mkdocs reads Markdown that was written for reading in the repository.

README.md is the site's home page, and the other files of PAGES are pages too. A link to any other file of the
repository becomes plain text, because the site does not contain it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site whose source is not in docs/.
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "topk_jsd.md": "kernels/topk_jsd/README.md",
    "flash_attention.md": "kernels/flash_attention/README.md",
    "paged_attention.md": "kernels/paged_attention/README.md",
}
SOURCES = {source: page for page, source in PAGES.items()}
LINK = re.compile(r"\[([^\]]*)\]\(([^()#\s:]+)(#[^()\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds PAGES."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's Markdown with links that lead somewhere on the site."""
    place = page.file.src_uri
    source = PAGES.get(place, f"docs/{place}")

    def on_site(link: re.Match[str]) -> str:
        text, path, anchor = link.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / target).exists():  # code that looks like a link, or a broken one, which mkdocs reports
            return link[0]
        if target not in SOURCES and not target.startswith("docs/"):
            return text
        there = SOURCES.get(target, target.removeprefix("docs/"))
        return f"[{text}]({posixpath.relpath(there, posixpath.dirname(place) or '.')}{anchor or ''})"

    return LINK.sub(on_site, markdown)
