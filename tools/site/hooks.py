"""What the site shows beside docs/: the README as its first page, and the changelog. And formulas, as MathML.

Called by mkdocs (mkdocs.yml). A browser draws MathML by itself: no script, nothing to fetch.
"""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = "documents.md"  # docs/index.md, since the README is the site's index


def inside(page: str) -> str:
    """A page of the root as one of docs/: the links too."""
    return re.sub(r"(\]\()docs/", r"\1", page)


def on_files(files: Files, config: Any) -> Files:
    index = files.get_file_from_path("index.md")
    assert index is not None
    files.remove(index)
    readme = (ROOT / "README.md").read_text().replace("docs/index.md", f"docs/{DOCUMENTS}")
    files.append(File.generated(config, "index.md", content=inside(readme)))
    files.append(File.generated(config, DOCUMENTS, content=(ROOT / "docs/index.md").read_text()))
    files.append(File.generated(config, "changelog.md", content=inside((ROOT / "CHANGELOG.md").read_text())))
    return files


def on_page_content(html: str, **_: Any) -> str:
    def mathml(match: re.Match[str]) -> str:
        return convert(unescape(match["tex"]).strip(), display="inline" if match["open"] == "(" else "block")

    return re.sub(
        r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
        mathml,
        html,
        flags=re.DOTALL,
    )
