"""What `make docs` needs beside the pages: README as front page, links into the repository, roles in docstrings."""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Files of the repository that are pages or pictures of the site, by the names they have there.
ADDED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/search_quality.png": "search_quality.png",
}


def on_files(files, config):
    """Add the files from outside the docs folder."""
    for source, name in ADDED.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at pages of the site; of links to source files only the text stays."""
    folder = ROOT if page.file.src_uri in ADDED.values() else ROOT / "docs"

    def link(match):
        text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match.group()
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        name = ADDED.get(path, path.removeprefix("docs/"))
        return f"{text}({name})" if files.get_file_from_path(name) else text[text.index("[") + 1 : -1]

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", link, markdown)


class Roles(griffe.Extension):
    """Docstrings as Markdown: the text of reST roles as code, ``Example::`` as a heading of the code below it."""

    def on_object(self, *, obj, **kwargs):
        """Rewrite the docstring of whatever was found."""
        if obj.docstring:
            text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^(\s*)(.*\w)::$", r"\1\2:", text, flags=re.MULTILINE)
