"""MkDocs hook: `<!-- built: NAME -->` on a page becomes a fact of the build that writes it.

So no count, version or date is typed by hand. How to cite comes from CITATION.cff, which the
host of the repository reads too.
"""

import ast
import re
import textwrap
from functools import lru_cache
from pathlib import Path

import yaml
from mkdocs.plugins import get_plugin_logger

from site_build.options import PLUGIN
from theme import api

log = get_plugin_logger("built")
MARK = re.compile(r"(?P<indent>^[ ]+)?<!--[ ]*built:[ ]*(?P<name>[\w ]*?)[ ]*-->", re.MULTILINE)


def on_page_markdown(markdown, page, config, files):
    if not MARK.search(markdown):
        return markdown
    engine = config.plugins[PLUGIN].engine
    known = facts(Path(config.config_file_path).parent, engine, files)

    def fact(match: re.Match) -> str:
        if match["name"] not in known:
            names = ", ".join(known)
            log.warning(f"{page.file.src_uri}: built: {match['name']!r} is not one of {names}")
            return match[0]
        return textwrap.indent(known[match["name"]], match["indent"] or "")

    return MARK.sub(fact, markdown)


def facts(root: Path, engine, files) -> dict[str, str]:
    runs = [run for run in engine.entries.values() if not run["error"]]
    outputs = [output for run in runs for cell in run["outputs"] for output in cell]
    records = [output["proof"] for output in outputs if "proof" in output]
    proofs = [record for record in records if "oracle" in record]
    counts = {
        "pages": len(files.documentation_pages()),
        "executed pages": len(runs),
        "cells": sum(len(run["outputs"]) for run in runs),
        "assertions": sum(run["assertions"] for run in runs),
        "proofs": len(proofs),
        "mistakes": sum("mistake" in record for record in records),
        "modules": sum(map(len, api.modules(root).values())),
        "tests": count_tests(root),
    }
    oracles = sorted({(proof["oracle"], proof["version"]) for proof in proofs})
    names = ", ".join(f"{name}\N{NO-BREAK SPACE}{version}" for name, version in oracles)
    origin = engine.origin
    return {name: f"{count:,}" for name, count in counts.items()} | {
        "oracles": f'<span class="fp-names">{names}</span>',
        "commit": origin.described or "files that stand in no commit",
        "report": report(origin),
        "bibtex": f"```bibtex\n{bibtex(root, origin)}\n```",
        "licence": f"```text\n{origin.licence.rstrip()}\n```",
    }


def count_tests(root: Path) -> int:
    """Test functions; one with many parameters counts once."""
    texts = [path.read_text("utf-8") for path in (root / "tests").rglob("test_*.py")]
    return sum(map(tests_in, texts))


@lru_cache(1024)
def tests_in(text: str) -> int:
    nodes = ast.walk(ast.parse(text))
    return sum(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in nodes)


def report(origin) -> str:
    """Where what is wrong is told."""
    if not origin.repo_url:
        return "Tell whoever gave you these pages: this copy does not know its repository."
    return f"[Open an issue]({origin.repo_url}/issues/new)."


def bibtex(root: Path, origin) -> str:
    """CITATION.cff as an entry of BibTeX, with the commit and addresses of this build."""
    cited = yaml.safe_load((root / "CITATION.cff").read_text("utf-8"))
    fields = {
        "title": f"{{{cited['title']}}}",
        "author": " and ".join(map(author, cited["authors"])),
        "year": origin.date[:4],
        "version": cited["version"],
        "license": cited["license"],
        "url": origin.site_url or origin.repo_url,
        "note": origin.described,
    }
    lines = [f"  {key} = {{{value}}}," for key, value in fields.items() if value]
    key = re.sub(r"\W+", "_", cited["title"].lower())
    return "\n".join([f"@software{{{key},", *lines, "}"])


def author(person: dict) -> str:
    """A body's name is in braces of its own, so that it isn't split into names."""
    if "name" in person:
        return f"{{{person['name']}}}"
    return f"{person['family-names']}, {person['given-names']}"
