"""One path for page, module and test; imports point back; the engine knows no page."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOPICS = [
    "foundations", "tokenizers", "layers", "position", "attention", "moe", "models", "multimodal",
    "peft", "quantization", "alignment", "distributed", "inference", "applications", "projects",
    "reference",
]  # fmt: skip
# Pages that teach without a module of their own.
WITHOUT_MODULE = {
    "reference/conventions",
    "reference/glossary",
    "reference/roadmap",
    "reference/papers",
    "reference/tags",
    "reference/about",
    "reference/verification",
    "reference/your_checkpoint",
}
GENERATED = {"reference/api/index"}  # by theme/api.py, with the pages below it
# Of a page that has several: the same formula for another machine, or the next question.
SECOND_FILES = {
    "attention/flash_attention_triton": "attention/flash_attention",
    "reference/training_memory": "reference/calculators",
    "reference/roofline": "reference/calculators",
}
ALLOWED = {
    "torch", "jaxtyping", "snippets", "collections", "contextlib", "dataclasses", "functools",
    "math", "pathlib", "typing", "warnings",
}  # fmt: skip
MODULES = sorted(
    path.relative_to(ROOT / "snippets").with_suffix("").as_posix()
    for path in (ROOT / "snippets").rglob("*.py")
    if path.name != "__init__.py"
)
LESSONS = [m for m in MODULES if not m.startswith("common/") and m not in SECOND_FILES]


def nav() -> list[str]:
    """The pages in the order of the navigation, without suffix."""

    class Loader(yaml.SafeLoader): ...

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)

    def leaves(item):
        if isinstance(item, str):
            yield item.rpartition(".")[0]
        else:
            for child in item.values() if isinstance(item, dict) else item:
                yield from leaves(child)

    return list(leaves(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))


def imports(path: Path) -> list[str]:
    """The modules that a file imports; for `from snippets.x import y` also x.y, if a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("module", LESSONS)
def test_a_module_has_its_page_and_its_test(module):
    topic, _, name = module.rpartition("/")
    assert module.split("/")[0] in TOPICS
    assert any((ROOT / f"site_src/{module}{s}").is_file() for s in (".md", ".ipynb"))
    assert (ROOT / f"tests/{topic}/test_{name}.py").is_file()


def test_a_page_has_its_module():
    lessons = {page for page in nav() if page.split("/")[-1] != "index"} - WITHOUT_MODULE
    assert lessons == set(LESSONS)


def test_a_test_of_a_topic_has_its_module():
    for topic in TOPICS:
        for test in (ROOT / "tests" / topic).glob("test_*.py"):
            assert f"{topic}/{test.stem.removeprefix('test_')}" in {*LESSONS, *SECOND_FILES}


def test_the_navigation_holds_every_page_in_the_order_of_the_topics():
    pages = [p for p in (ROOT / "site_src").rglob("*") if p.suffix in (".md", ".ipynb")]
    stems = {p.relative_to(ROOT / "site_src").with_suffix("").as_posix() for p in pages}
    pages = [page for page in nav() if page not in GENERATED]
    assert set(pages) == stems and len(pages) == len(stems)
    topics = [page.split("/")[0] for page in nav()]
    ranks = [TOPICS.index(topic) for topic in topics if topic in TOPICS]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_back(module):
    order = {page: number for number, page in enumerate(nav())}
    order |= {second: order[page] + 0.5 for second, page in SECOND_FILES.items()}
    for name in imports(ROOT / f"snippets/{module}.py"):
        target = name.removeprefix("snippets.").replace(".", "/")
        if name.startswith("snippets.common") or target not in MODULES:
            continue
        assert not module.startswith("common/"), f"{module} imports {name}: a lesson"
        assert order[target] < order[module], f"{module} imports {name}, a later page's"


@pytest.mark.parametrize("module", LESSONS)
def test_a_module_needs_torch_and_jaxtyping_only(module):
    roots = {name.partition(".")[0] for name in imports(ROOT / f"snippets/{module}.py")}
    assert roots <= ALLOWED


def test_the_engine_imports_no_snippets_and_names_no_page():
    for path in (ROOT / "site_build").glob("*.py"):
        text = path.read_text("utf-8")
        assert not [name for name in imports_of_engine(path) if name.startswith("snippets")]
        assert not [page for page in nav() if "/" in page and page in text]


def imports_of_engine(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return [
        name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    ]


def test_no_module_turns_the_shape_checks_off():
    for module in MODULES:
        text = (ROOT / f"snippets/{module}.py").read_text("utf-8")
        assert "from __future__ import annotations" not in text
