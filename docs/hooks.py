"""Pages of the site that come from files outside `docs/`, and links between documents that hold in both places.

README, CONTRIBUTING, CHANGELOG and the quickstart notebook are pages as they are. Any other file of the repository that
a document links to is copied into the site. So a relative link works in a checkout, on a code host and on the site,
and no address of a host is written down.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "examples/quickstart.ipynb"
# Files outside docs/ that are pages, and their names on the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES[NOTEBOOK] = "quickstart.md"
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside `docs/`, and the files that documents link to."""
    for source, page in PAGES.items():
        if source == NOTEBOOK:
            exporter = nbconvert.MarkdownExporter()
            text, resources = exporter.from_filename(str(ROOT / source))
            for name, picture in resources["outputs"].items():
                files.append(File.generated(config, name, content=picture))
        else:
            text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
    for file in list(files.documentation_pages()):
        source = _repository_path(file.src_uri)
        for _, target in _LINK.findall(file.content_string):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            uri = _site_uri(path)
            if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site."""
    source, here = _repository_path(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def on_the_site(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if not (ROOT / path).exists():  # of the notebook's pictures, or wrong: mkdocs says so
            return match[0]
        return match[1] + posixpath.relpath(_site_uri(path), here or ".")

    return _LINK.sub(on_the_site, markdown)


def _repository_path(uri: str) -> str:
    """Return where in the repository a page of the site comes from."""
    for source, page in PAGES.items():
        if uri == page:
            return source
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def _site_uri(path: str) -> str:
    """Return where on the site a file of the repository is."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
