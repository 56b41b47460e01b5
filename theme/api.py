"""MkDocs hook: an API page for each topic of `snippets/`, for mkdocstrings to fill.

The Markdown is made here, so that a new module appears without an entry anywhere. The
docstrings are read statically; no module is imported.
"""

import ast
import re
import textwrap
from pathlib import Path
from urllib.parse import urljoin

import yaml
from mkdocs.structure.files import File
from mkdocs.utils import meta

from site_build.options import stems
from theme import signatures

FOLDER = "reference/api/"
INDEX = f"{FOLDER}index.md"  # the entry in the navigation that the topics join

HEAD = """---
title: API
description: Every class and function of the modules, with the shapes of their tensors
search: {boost: 0.3}
---

# API

The modules of all pages, from their docstrings. A letter in a shape, as in
`Float[Tensor, "b t d"]`, is explained by the axes at the head of its module.
"""


def modules(root: Path) -> dict[str, list[str]]:
    """Topic: its modules, as paths below `snippets/` without suffix."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "snippets").glob("*/**/*.py")):
        if path.name != "__init__.py":
            module = path.relative_to(root / "snippets").with_suffix("").as_posix()
            found.setdefault(module.partition("/")[0], []).append(module)
    return found


def in_order(topics: dict[str, list[str]], pages: list[str]) -> dict[str, list[str]]:
    """The same in the order of the navigation; what has no page comes last."""

    def rank(module: str) -> tuple[int, str]:
        return (pages.index(module) if module in pages else len(pages), module)

    ordered = {topic: sorted(group, key=rank) for topic, group in topics.items()}
    return dict(sorted(ordered.items(), key=lambda item: rank(item[1][0])))


def with_topics(nav, titles: dict[str, str]):
    """The navigation with the topics' pages below the index."""
    if isinstance(nav, list):
        return [with_topics(item, titles) for item in nav]
    if isinstance(nav, dict):
        return {name: with_topics(item, titles) for name, item in nav.items()}
    return [INDEX, *({t: address(topic)} for topic, t in titles.items())] if nav == INDEX else nav


def address(topic: str) -> str:
    return INDEX.replace("index", topic)


def topic_of(name: str) -> str:
    """The topic of an API page; empty for the index, and for all other pages."""
    found = re.fullmatch(rf"{FOLDER}(?!index)(\w+)\.md", name)
    return found[1] if found else ""


def title(topic: str, docs: Path) -> str:
    """What the topic's own pages call it; a folder without pages is called by its name."""
    index = docs / topic / "index.md"
    data = meta.get_data(index.read_text("utf-8"))[1] if index.is_file() else {}
    return data.get("title") or topic.replace("_", " ").capitalize()


def description(topic: str, group: list[str]) -> str:
    """In at most 160 characters, so not always with all modules."""
    text = f"Classes and functions of the {topic} modules, with the shapes of their tensors: "
    names = [module.rpartition("/")[2] for module in group]
    while len(text + ", ".join(names)) > 160:
        names.pop()
    return text + ", ".join(names)


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, without the stop."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).removesuffix(".")


def heading(page: File) -> str:
    """How a page calls itself."""
    text, data = meta.get_data(page.content_string)
    first = re.search(r"^# (.+)$", text, re.MULTILINE)
    return data.get("title") or (first[1] if first else Path(page.src_uri).stem)


def index_page(root: Path, topics: dict[str, list[str]], titles: dict[str, str]) -> str:
    parts = [HEAD]
    for topic, group in topics.items():
        parts.append(f"## [{titles[topic]}]({topic}.md)\n")
        for module in group:
            name, about = module.partition("/")[2], summary(root / f"snippets/{module}.py")
            link = f"[`{name}`]({topic}.md#snippets.{module.replace('/', '.')})"
            parts.append(f"- {link}: {about}")
        parts.append("")
    return "\n".join(parts)


def topic_page(
    root: Path, topic: str, name: str, group: list[str], pages: dict[str, File], edit: str
) -> str:
    """`edit` begins the addresses where files are edited; empty where that's unknown."""
    data = {"title": f"{name}: API", "description": description(topic, group)}
    data["search"] = {"boost": 0.3}
    parts = [f"---\n{yaml.safe_dump(data, width=1000)}---\n\n# {name}: API\n"]
    parts.append(f"{data['description'].partition(':')[0]}.\n")
    for module in group:
        path = f"snippets.{module.replace('/', '.')}"
        label = module.partition("/")[2]
        parts.append(f'## `{path}` {{ #{path} .api-module data-toc-label="{label}" }}\n')
        about = []
        if module in pages:
            page = pages[module]
            about.append(f"Taught and proved on [{heading(page)}](../../{page.src_uri}).")
        if edit:
            about.append(f"[Edit this module]({edit}snippets/{module}.py).")
        parts.append(f"{' '.join(about)}\n")
        parts.append(f"::: {path}\n")
        parts.append(folded(root / f"snippets/{module}.py", f"snippets/{module}.py"))
    return "\n".join(parts)


def folded(path: Path, name: str) -> str:
    """A module's source, folded; search finds it on the module's own page."""
    code = path.read_text("utf-8").rstrip()
    text = f"``````{{ .python data-search-exclude }}\n{code}\n``````"
    return f'??? quote "Source: {name}"\n\n' + textwrap.indent(text, "    ") + "\n"


def on_config(config):
    signatures.install()
    topics = in_order(modules(Path(config.config_file_path).parent), stems(config.nav))
    config.nav = with_topics(config.nav, named(topics, config))
    return config


def named(topics, config) -> dict[str, str]:
    return {topic: title(topic, Path(config.docs_dir)) for topic in topics}


def on_files(files, config):
    root = Path(config.config_file_path).parent
    topics = in_order(modules(root), stems(config.nav))
    pages = {file.src_uri.rpartition(".")[0]: file for file in files.documentation_pages()}
    edit = ""
    if config.repo_url and config.edit_uri:
        edit = urljoin(f"{config.repo_url.rstrip('/')}/", f"{config.edit_uri}../")
    titles = named(topics, config)
    files.append(File.generated(config, INDEX, content=index_page(root, topics, titles)))
    for topic, group in topics.items():
        content = topic_page(root, topic, titles[topic], group, pages, edit)
        files.append(File.generated(config, address(topic), content=content))
    return files


def on_page_content(html, page, config, files):
    """Methods stay out of the table of contents: it lists classes and functions."""
    if page.file.src_uri.startswith(FOLDER):
        for module in page.toc:
            for topic in module.children:
                for member in topic.children:
                    member.children = []
    return html
