"""A hook of mkdocs: pages of the site that live at the root of the repository.

The README is the first page; CONTRIBUTING and CHANGELOG are pages of their own. Their links are
written for the repository and are rewritten for the site here, as are links of the pages in
``docs/`` to these files. Files that are no pages, such as the licence, are copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Path in the repository -> path in the site, which has the paths of ``docs/``."""
COPIES = ("LICENSE", "CITATION.cff")
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the copies."""
    root = Path(config.config_file_path).parent
    for source, target in PAGES.items():
        text = relinked((root / source).read_text(encoding="utf-8"), source, target)
        files.append(File.generated(config, target, content=text))
    for name in COPIES:
        # Browsers show a .txt, and would download a file without an ending.
        text = (root / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"{name}.txt", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page in ``docs/``."""
    target = page.file.src_uri
    return markdown if target in PAGES.values() else relinked(markdown, f"docs/{target}", target)


def relinked(text: str, source: str, target: str) -> str:
    """Return ``text`` with its relative links as they are in the site.

    Args:
        text: Markdown.
        source: Where it stands in the repository.
        target: Where it stands in the site.
    """

    def new(match: re.Match[str]) -> str:
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        inside = linked.removeprefix("docs/")
        if linked in COPIES:
            inside = f"{linked}.txt"
        elif linked in PAGES:
            inside = PAGES[linked]
        path = posixpath.relpath(inside, posixpath.dirname(target) or ".")
        return f"]({path}{match[2] or ''})"

    return _LINK.sub(new, text)
