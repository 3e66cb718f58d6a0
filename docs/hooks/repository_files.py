"""Brings files of the repository that pages link to, such as `../benchmarks/results/speed.png`, into the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(\.\./(?P<path>[^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    pages = [page for page in files.documentation_pages() if "/" not in page.src_uri]
    paths = {found["path"] for page in pages for found in LINK.finditer(page.content_string)}
    for path in sorted(paths):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    return markdown if "/" in page.file.src_uri else LINK.sub(r"](\g<path>)", markdown)
