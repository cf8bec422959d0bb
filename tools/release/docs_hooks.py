"""mkdocs hooks: pages that live in the repository's root, links to files that are no pages, and
cells of tables that hold sentences."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# A page of the site for a file of the root.
PAGES = {"index.md": "README.md", "releases.md": "CHANGELOG.md"}
# A search shows guides before tables of measurements.
BOOST = {"guides/": 2.0, "quickstart": 2.0, "results": 0.2, "measured": 0.2, "cost": 0.2}


def on_files(files, config):
    for page, source in PAGES.items():
        text = re.sub(r"\]\(docs/([\w/.-]+)", r"](\1", (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown, page, config, files):
    """A link to a file or folder of the repository that is no page becomes its text; the page's
    weight in a search."""
    boost = [b for start, b in BOOST.items() if page.file.src_uri.startswith(start)]
    page.meta.setdefault("search", {"boost": boost[0]} if boost else {})
    root_page = page.file.src_uri in PAGES
    folder = (ROOT if root_page else ROOT / "docs") / Path(page.file.src_uri).parent

    def link(found):
        path = (folder / found.group(2)).resolve()
        outside = (
            path.is_relative_to(ROOT)
            and path.exists()
            and (path.is_dir() or not path.is_relative_to(ROOT / "docs"))
        )
        return (
            f"`{found.group(1)}`"
            if outside and not (root_page and path.parent == ROOT / "docs")
            else found.group(0)
        )

    return re.sub(
        r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([\w./-]+)(?:#[\w-]+)?\)", link, markdown
    )


def on_page_content(html, page, config, files):
    """A cell that holds a sentence is marked, for site.css to keep it wide enough on a phone."""

    def cell(found):
        words = re.sub(r"<[^>]+>", "", found.group(2))
        return (
            f"<td{found.group(1)} data-long>{found.group(2)}</td>" if len(words) > 60 else found[0]
        )

    return re.sub(r"<td([^>]*)>(.*?)</td>", cell, html, flags=re.DOTALL)
