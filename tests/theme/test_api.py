"""The API pages: every module, class, function and method, with no entry anywhere."""

import ast
import html
import json
import posixpath
import re
from pathlib import Path

import griffe
import pytest
from mkdocstrings_handlers.python._internal import rendering

from site_build.options import stems
from theme import api, signatures

ROOT = Path(__file__).parents[2]
MODULES = [module for group in api.modules(ROOT).values() for module in group]


def anchors(module: str) -> list[str]:
    """The ids that a module's entry must have."""
    name = f"snippets.{module.replace('/', '.')}"
    found = [name]

    def collect(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                found.append(f"{prefix}.{node.name}")
                if isinstance(node, ast.ClassDef):
                    collect(node.body, found[-1])

    collect(ast.parse((ROOT / f"snippets/{module}.py").read_text()).body, name)
    return found


def page_of(site: Path, module: str) -> str:
    return (site / f"reference/api/{module.partition('/')[0]}.html").read_text()


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_its_anchor(site, module):
    ids = set(re.findall(r'\bid="([^"]+)"', page_of(site, module)))
    wanted = anchors(module)
    assert len(wanted) > 1 and set(wanted) <= ids


@pytest.mark.parametrize("module", MODULES)
def test_an_entry_holds_its_source_and_leads_to_its_page(site, module):
    page, name = page_of(site, module), module.replace("/", ".")
    entry = page.partition(f' id="snippets.{name}"')[2].partition("<h2 ")[0]
    text = html.unescape(re.sub(r"<[^>]+>", "", entry))
    source = (ROOT / f"snippets/{module}.py").read_text()
    assert source.strip() in text
    lesson = any((ROOT / f"site_src/{module}{suffix}").is_file() for suffix in (".md", ".ipynb"))
    address = posixpath.relpath(f"{module}.html", "reference/api")
    assert lesson == (f'href="{address}"' in entry)
    if "Axes:" in source:
        assert "<strong>Axes:</strong>" in entry


def test_the_index_and_the_navigation_list_all(site):
    index = (site / "reference/api/index.html").read_text()
    for module in MODULES:
        topic = module.partition("/")[0]
        assert f'href="{topic}.html#snippets.{module.replace("/", ".")}"' in index
        assert re.search(rf'<a href="{topic}.html" class="md-nav__link"', index)


def test_search_finds_a_class_and_its_source_once(site):
    entries = json.loads((site / "search/search_index.json").read_text())["docs"]
    found = [
        e["location"] for e in entries if e["title"].partition("<")[0] == "GroupedQueryAttention"
    ]
    assert found == ["reference/api/attention.html#snippets.attention.gqa.GroupedQueryAttention"]
    assert not [e for e in entries if "/api/" in e["location"] and "register_buffer" in e["text"]]
    assert not [e for e in entries if "/api/" in e["location"] and "super()" in e["text"]]


def test_signatures_show_shapes_a_parameter_a_line(site):
    signature = re.search(
        r'class="doc-signature highlight">.*?</pre>', page_of(site, "attention/gqa").partition(
            'id="snippets.attention.gqa.grouped_attention"'
        )[2], re.DOTALL,
    )  # fmt: skip
    text = html.unescape(re.sub(r"<[^>]+>", "", signature[0].partition(">")[2]))
    assert text.split("\n")[:4] == [
        "grouped_attention(",
        '    q: Float[Tensor, "b h t k"],',
        '    k: Float[Tensor, "b g s k"],',
        '    v: Float[Tensor, "b g s k"],',
    ]
    assert text.strip().endswith(') -> Float[Tensor, "b h t k"]') and "'" not in text


def test_mkdocstrings_wraps_signatures_in_our_way(monkeypatch):
    monkeypatch.setattr(rendering, "_get_formatter", rendering._get_formatter)  # to be put back
    monkeypatch.setattr(signatures, "wrap", lambda code, length: "def x(\n  ours\n):\n    pass\n")
    signatures.install()
    assert rendering._format_signature("f", "(a, b, c)", 5) == "f(\n  ours\n)"


def test_wrapping_leaves_strings_and_brackets_whole():
    code = (
        'def f(a: dict[str, tuple[int, int]] = {}, *, b: str = ", )", c=(1, 2)) -> list[int]: pass'
    )
    assert signatures.wrap(code, 72) == (
        "def f(\n    a: dict[str, tuple[int, int]] = {},\n    *,\n"
        '    b: str = ", )",\n    c=(1, 2),\n) -> list[int]:\n    pass\n'
    )
    assert signatures.wrap("x = (1, 2)", 3) == "x = (1, 2)"


def test_topics_follow_the_navigation(tmp_path):
    for module in ("b/two", "b/one", "a/x", "common/proof", "a/__init__", "__init__"):
        path = tmp_path / f"snippets/{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    nav = [{"Home": "index.md"}, {"T": ["b/two.ipynb", "b/one.md", {"A": ["a/x.md"]}]}]
    topics = api.in_order(api.modules(tmp_path), stems(nav))
    assert topics == {"b": ["b/two", "b/one"], "a": ["a/x"], "common": ["common/proof"]}
    (tmp_path / "docs/a").mkdir(parents=True)
    (tmp_path / "docs/a/index.md").write_text("---\ntitle: Alpha\n---\n\n# All of them\n")
    titles = {topic: api.title(topic, tmp_path / "docs") for topic in topics}
    added = api.with_topics([*nav, {"API": api.INDEX}], titles)
    pages = {"B": "b", "Alpha": "a", "Common": "common"}
    pages = {name: f"reference/api/{file}.md" for name, file in pages.items()}
    assert added == [*nav, {"API": [api.INDEX, *({k: v} for k, v in pages.items())]}]


def test_what_the_source_or_a_signature_says_has_no_entry_of_its_own(tmp_path):
    (tmp_path / "topic.py").write_text(
        '"""A module.\n\nAxes: b batch,\n      t token.\n"""\n'
        "from dataclasses import dataclass\nLIMIT = 3\n\n"
        "@dataclass(frozen=True)\nclass Config:\n    size: int = 4\n"
        "    def __post_init__(self):\n        assert self.size\n"
        '    most: int = 9\n    """Of all."""\n\n'
        "class Layer:\n    def __init__(self):\n        self.weight = 1\n"
    )
    extension = griffe.load_extensions(str(ROOT / "theme/docstrings.py"))
    module = griffe.load("topic", search_paths=[tmp_path], extensions=extension)
    for name in ("LIMIT", "Layer.weight", "Config.size", "Config.__post_init__"):
        assert not module[name].is_public, name
    assert module["Config.most"].is_public
    assert [p.name for p in module["Config"].parameters] == ["self", "size", "most"]
    assert module.docstring.value.endswith("**Axes:** b batch, t token.")


def test_the_fields_of_a_configuration_stand_in_its_signature(site):
    page = page_of(site, "models/mistral").partition('id="snippets.models.mistral.MistralConfig"')[
        2
    ]
    signature = re.search(r'class="doc-signature highlight">.*?</pre>', page, re.DOTALL)[0]
    text = html.unescape(re.sub(r"<[^>]+>", "", signature))
    assert "sliding_window: int" in text and "rope_theta: float" in text  # the latter is Llama's
