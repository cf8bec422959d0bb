"""mkdocs hooks: pages that live in the repository's root, and links to files that are no pages."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# A page of the site for a file of the root.
PAGES = {"index.md": "README.md", "releases.md": "CHANGELOG.md"}


def on_files(files, config):
    for page, source in PAGES.items():
        text = (ROOT / source).read_text()
        text = re.sub(r"\]\(docs/([\w/.-]+)", r"](\1", text)
        files.append(File.generated(config, page, content=text))
    for name in ("cost.md", "measured.md", "results.md", "models.md", "cluster.md"):
        if not (ROOT / "docs" / name).exists():  # a page that a command writes, and has not written yet
            files.append(File.generated(config, name, content=f"# {name[:-3].capitalize()}\n\nNot written yet.\n"))
    return files


def on_page_markdown(markdown, page, config, files):
    """A link to a file or folder of the repository that is no page is its text; a figure that its command has not drawn yet says so."""
    root_page = page.file.src_uri in PAGES
    folder = (ROOT if root_page else ROOT / "docs") / Path(page.file.src_uri).parent

    def link(found):
        path = (folder / found.group(2)).resolve()
        outside = (
            path.is_relative_to(ROOT) and path.exists() and (path.is_dir() or not path.is_relative_to(ROOT / "docs"))
        )
        return f"`{found.group(1)}`" if outside and not (root_page and path.parent == ROOT / "docs") else found.group(0)

    def figure(found):
        drawn = ROOT / "docs" / Path(page.file.src_uri).parent / found.group(2)
        return found.group(0) if drawn.exists() else f"*{found.group(1)}: not drawn yet.*"

    markdown = re.sub(r"!\[([^\]]*)\]\(([\w./-]+)\)", figure, markdown)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([\w./-]+)(?:#[\w-]+)?\)", link, markdown)
