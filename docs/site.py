"""Hooks of mkdocs: what the site needs beyond its pages.

1. The commands' help, read from typer, stands in reference/commands.md in place of its marker.
2. A drawing is put into its page, so that its colours follow the page's light or dark mode.
3. A file of the repository that a page links to is copied beside the pages, so that no link is dead. Of a link to a
   text outside of the pages the words stay.
4. In docstrings and help, the name of a page becomes a link to it.
5. A link whose words are a page's file name gets that page's title.
6. What a page of the reference says to those who read it as a file is left out.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
COMMANDS = "<!-- commands -->"
OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)\)")
EXAMPLE = re.compile(r"\s*For example: (dynamo-jax [^\n(]*?)(?:\.(?= )|(?=\n|$|\())([^\n]*)")
AS_FILE = re.compile(r"^> Read as a file.*\n(?:> .*\n)*\n?", re.MULTILINE)
BY_FILE = re.compile(r"\[[\w/-]+\.md\]\(([\w/.-]+\.md(?:#[\w-]+)?)\)")
WIDEST = 70  # characters of a line of code
NAMED = re.compile(r"docs/([a-z0-9/-]+)\.md")


def from_root(page: str, link: str) -> Path | None:
    """The file that a relative link of a page leads to, if it lies outside of the pages' folder."""
    path = (DOCS / page).parent.joinpath(link).resolve()
    outside = path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)
    return path.relative_to(ROOT) if outside else None


def on_files(files: Any, config: Any) -> Any:
    wanted = set()
    for page in files.documentation_pages():
        links = OUTSIDE.findall(Path(page.abs_src_path).read_text())
        found = {from_root(page.src_uri, link) for _, link in links}
        wanted |= {path for path in found if path and path.suffix != ".md"}
    for path in sorted(wanted):
        files.append(File.generated(config, f"files/{path.as_posix()}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = posixpath.dirname(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        path = from_root(page.file.src_uri, found[2])
        if path is None:
            return found[0]
        if path.suffix == ".md":  # no page of the site, and its own links would be dead here
            return found[1]
        return f"[{found[1]}]({posixpath.relpath(f'files/{path.as_posix()}', here or '.')})"

    def titled(found: re.Match[str]) -> str:
        path = (DOCS / page.file.src_uri).parent / found[1].partition("#")[0]
        title = path.read_text().partition("\n")[0].removeprefix("# ") if path.is_file() else path.name
        return f"[{title}]({found[1]})"

    markdown = AS_FILE.sub("", OUTSIDE.sub(moved, BY_FILE.sub(titled, markdown)))
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    def drawn(found: re.Match[str]) -> str:
        name = Path(found["src"]).name
        return (DOCS / "drawings" / name).read_text()

    def linked(found: re.Match[str]) -> str:
        target = files.get_file_from_path(f"{found[1]}.md")
        if target is None:
            return found[0]
        return f'<a href="{target.url_relative_to(page.file)}">{found[0]}</a>'

    html = re.sub(r'<img [^>]*src="(?P<src>[^"]*drawings/[^"]+\.svg)"[^>]*>', drawn, html)
    return NAMED.sub(linked, html) if page.file.src_uri.startswith("reference/") else html


def commands() -> str:
    """Each command's words and options as markdown."""
    import typer

    from dynamo_jax.commands.app import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        help_ = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help or "")
        parts += [f"## dynamo-jax {name}", EXAMPLE.sub(example, help_)]
        options = [p for p in command.params if getattr(p, "help", None) and not p.hidden]
        if options:
            rows = ["| option | default | meaning |", "| --- | --- | --- |", *(map(row, options))]
            parts.append("\n".join(rows))
    return "\n\n".join(parts)


def example(found: re.Match[str]) -> str:
    """The command of a help's example as a block of its own, in lines that a narrow page has room for."""
    lines = [""]
    for word in re.split(r" (?=--)", found[1].strip().rstrip(".")):  # an option and its value stay together
        if len(lines[-1]) + len(word) > WIDEST:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    rest = found[2].strip()
    return "\n\n```sh\n" + " \\\n".join(lines) + "\n```\n\n" + rest


def row(option: Any) -> str:
    """One option as a row of a table."""
    metavar = f" `{option.metavar}`" if option.metavar else ""  # may break, which the option may not
    shown = "required" if option.required else f"`{option.default}`" if option.default else ""
    help_ = re.sub(r"([|\[\]])", r"\\\1", " ".join(option.help.split()))
    return f"| `{', '.join(option.opts)}`{metavar} | {shown} | {help_} |"
