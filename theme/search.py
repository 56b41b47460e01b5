"""MkDocs hook: what the search knows, how it ranks, and when it is loaded.

Outputs are numbers and tables: they would drown the words, so they stay out. Of code stays each
line that has a name which the page's code didn't have before. A name is one word to the search,
so that `q_proj` does not find everything with a q; it is found by its later parts too: behind
GroupedQueryAttention stand `queryattention` and `attention`, unseen.

What a page is known by comes with it as `names`: glossary, search.yml, its module's definitions.
The ranking is in search-worker.js, which becomes part of the theme's own worker.
"""

import ast
import json
import re
from pathlib import Path

import yaml
from mkdocs.plugins import CombinedEvent, event_priority, get_plugin_logger

from theme import assets, glossary

log = get_plugin_logger("search")

OUTPUT = re.compile(r'<(div|img) (?=class="[^"]*\b(output|figure)\b)')
CODE = re.compile(r"(?<=<pre><code>).*?(?=</code></pre>)", re.DOTALL)
# What somebody may look for in code: a name of several words, a class, a call.
SOUGHT = re.compile(r"[A-Za-z]\w*_\w+|\b[A-Z]\w*[a-z]\w*|[a-z]\w{2,}(?=\()")
NAME = re.compile(r"\b[A-Za-z]\w*(_|[A-Z][a-z])\w*")
PART = re.compile(r"(?<=_)[A-Za-z]|(?<=[^\W_])[A-Z](?=[a-z])|(?<=[a-z])[A-Z]")
SHORTEST = 3  # letters of a part
BLOCK = re.compile(r"<pre\b.*?</pre>", re.DOTALL)
SPAN = re.compile(r"</?span\b[^>]*>")
EXCLUDED = re.compile(r'\s?data-search-\w+="[^"]+"')

WORKER = "assets/search-worker.js"
WORDS = "search.yml"
# The theme's script loads the index with every page. Here it waits until the search is opened, and
# marks what was found on a page without it: of the index that needs the separator only.
LAZY = ('location.protocol!=="file:"),', "!1),")
MARKS = ("return z([t,r.pipe(", "return z([$({config:{separator:%s}}),r.pipe(")


def on_files(files, config):
    separator = json.dumps(config.plugins["material/search"].config.separator)
    (old, new), (pair, ours) = LAZY, MARKS
    changes = [(assets.SCRIPT, old, 1, new), (assets.SCRIPT, pair, 1, ours % separator)]
    assets.change(files, changes)
    part = files.get_file_from_path(WORKER)
    for worker in assets.matching(files, assets.WORKER):
        worker.content_string += f"\n{part.content_string}"
    for source in (WORKER, WORDS):  # no files of the site
        if file := files.get_file_from_path(source):
            files.remove(file)
    return files


def on_page_content(html, page, config, files):
    return OUTPUT.sub(r'<\1 data-search-exclude="" ', html)


@event_priority(50)  # before the search plugin reads the page
def plain_code(context, page, config, nav):
    """Colours are no words, and most of what the plugin's parser would go through."""
    context["coloured"] = page.content
    page.content = BLOCK.sub(lambda block: SPAN.sub("", block[0]), page.content)
    return context


@event_priority(-50)
def coloured_code(context, page, config, nav):
    page.content = EXCLUDED.sub("", context.pop("coloured"))  # as the plugin does
    return context


on_page_context = CombinedEvent(plain_code, coloured_code)


@event_priority(-50)  # after the index is written, before `offline` copies it
def on_post_build(config):
    path = Path(config.site_dir, "search/search_index.json")
    index = json.loads(path.read_text("utf-8"))
    sections = index["docs"]
    shorten(sections)
    for section in sections:
        for field in ("title", "text"):
            section[field] = with_parts(section[field])
    name(sections, names(Path(config.docs_dir), Path(config.config_file_path).parent))
    index["config"]["fields"]["names"] = {"boost": 1}
    path.write_text(json.dumps(index, separators=(",", ":")), "utf-8")


def shorten(sections: list[dict]) -> None:
    """Leave of each page's code the lines that have a word which was not in it before."""
    known: dict[str, set] = {}

    for section in sections:
        seen = known.setdefault(section["location"].partition("#")[0], set())

        def telling(match: re.Match, seen=seen) -> str:
            lines = []
            for line in match[0].splitlines():
                words = set(SOUGHT.findall(line))
                if words - seen:
                    lines.append(line.strip())
                    seen |= words
            return "\n".join(lines)

        section["text"] = CODE.sub(telling, section["text"])


def names(docs: Path, root: Path) -> dict[str, list[str]]:
    """Page, perhaps with a section: what it is known by."""
    found: dict[str, list[str]] = {}
    for entry in glossary.read(docs / glossary.SOURCE):
        found.setdefault(entry.page, []).extend(entry.spellings)
    if (docs / WORDS).exists():
        for page, queries in yaml.safe_load((docs / WORDS).read_text("utf-8")).items():
            found.setdefault(page, []).extend(queries)
    for path in docs.rglob("*.md"):
        page = path.relative_to(docs).with_suffix("").as_posix()
        module = root / f"snippets/{page}.py"
        if module.exists():
            found.setdefault(page, []).extend(definitions(module.read_text("utf-8")))
    return found


def definitions(code: str) -> list[str]:
    """A module's public classes and functions, and the parts that its classes have."""
    tree = ast.parse(code)
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = [node.name for node in tree.body if isinstance(node, kinds)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            found.append(node.targets[0].attr)
    return [name for name in dict.fromkeys(found) if not name.startswith("_")]


def name(sections: list[dict], known: dict[str, list[str]]) -> None:
    by_place = {section["location"]: section for section in sections}
    for page, phrases in known.items():
        stem, mark, anchor = page.partition("#")
        section = by_place.get(f"{stem}.html{mark}{anchor}")
        if section is None:
            log.warning(f"there is no {page}, which {phrases[0]!r} should lead to")
        else:
            section["names"] = list(dict.fromkeys(phrases))


def with_parts(text: str) -> str:
    """Each name, at its first place, followed by its later parts with all that comes after."""
    known = set()

    def parts(match: re.Match) -> str:
        name = match[0]
        tails = [name[part.start() :].lower() for part in PART.finditer(name)]
        new = [tail for tail in tails if len(tail) >= SHORTEST and tail not in known]
        known.update(new)
        return f"{name}<i hidden> {' '.join(new)}</i>" if new else name

    return NAME.sub(parts, text)
