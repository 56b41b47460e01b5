"""What the build says on pages about pages."""

import json
import subprocess
import urllib.parse

import pytest

from site_build.engine import BuildFailed, Engine
from site_build.facts import Origin
from site_build.options import Options

META = "title: A lesson\ndescription: What it is about\nminutes: 12\nproves: [one thing, another]"
PROOF = """import torch
from snippets.common.proof import parity
x = torch.arange(3.0)
parity(x, x + 1e-7, without=-x, oracle="torch", config={"n": 3})"""


def build(project, **about) -> None:
    origin = Origin(**about)
    Engine(
        project.root,
        project.root / "site_src",
        Options.of(project.options),
        log=lambda _: None,
        origin=origin,
        order=["index", "topic/index", "topic/b", "topic/a"],
    ).build()


@pytest.fixture
def lesson(quick):
    """One page with its module and test, and what they need."""
    quick.write("snippets/topic/a.py", "def value():\n    return 1\n")
    quick.write("tests/topic/test_a.py", "")
    quick.page("topic/a.md", "from snippets.topic.a import value\nassert value() == 1", meta=META)
    return quick


def test_the_head_says_what_a_page_proves_and_where_its_parts_are(lesson):
    build(lesson)
    text = lesson.text("topic/a.md")
    title, _, rest = text.partition("# Page\n")
    head = rest.partition("</div>")[0]
    assert title.startswith("---") and head.lstrip().startswith('<div class="fp-head"')
    assert "**Proves** one thing; another. 1 assertions held in this build." in head
    assert (
        "12 minutes · [Module](../snippets/topic/a.py) · [Test](../tests/topic/test_a.py)" in head
    )


def test_the_head_says_what_a_page_needs_and_gives(lesson):
    given = "able: [do one thing, say another]\nassumes: [some Python]\nprerequisites: [topic/b]"
    code = "from snippets.topic.a import value\nassert value() == 1"
    lesson.page("topic/a.md", code, meta=f"{META}\n{given}")
    lesson.write("site_src/topic/b.md", "---\ntitle: Before\n---\n# B\n")
    build(lesson)
    head = lesson.text("topic/a.md").partition("</div>")[0]
    assert "**You need** [Before](../topic/b.md), some Python." in head
    assert "**You will be able to** do one thing; say another." in head
    lesson.page("topic/a.md", code, meta=f"{META}\nprerequisites: [topic/c]")
    with pytest.raises(BuildFailed, match=r"topic/a.md: .*there is no page topic/c"):
        build(lesson)


def test_the_head_names_the_oracle_and_the_largest_difference(lesson, monkeypatch):
    from pathlib import Path

    proof = Path(__file__).parents[2] / "snippets/common/proof.py"
    lesson.write("snippets/common/proof.py", proof.read_text())
    lesson.page("topic/a.md", PROOF, meta=META)
    build(lesson)
    assert "Equal to torch 2." in lesson.text("topic/a.md") and " to 1e-07." in lesson.text(
        "topic/a.md"
    )


def test_a_page_without_minutes_has_no_head_and_one_without_cells_no_foot(lesson):
    lesson.write("site_src/plain.md", "---\nminutes: 3\n---\n# Plain\n\nText.\n")
    lesson.page("bare.md", "from snippets.value import value\nassert value() == 1")
    build(lesson)
    assert "fp-foot" not in lesson.text("plain.md") and "3 minutes" in lesson.text("plain.md")
    assert "fp-head" not in lesson.text("bare.md") and "fp-foot" in lesson.text("bare.md")


def test_the_foot_says_what_the_page_ran_on_and_takes_a_report(lesson):
    build(lesson)
    assert "Something wrong" not in lesson.text("topic/a.md")
    build(lesson, repo_url="https://example.org/lab", commit="0123456789abcdef", date="2026-01-02")
    foot = lesson.text("topic/a.md").partition('class="fp-foot"')[2]
    assert "Ran on Python 3." in foot and "commit 0123456789 of 2026-01-02" in foot
    link = foot.partition("(https://example.org/lab/issues/new?")[2].partition(")")[0]
    query = urllib.parse.parse_qs(link)
    assert query["title"] == ["A lesson: "]
    for said in ("topic/a.md", "Python 3.", "0123456789"):
        assert said in query["body"][0]


def test_cards_topics_and_studies_are_in_the_order_of_the_navigation(lesson):
    lesson.write(
        "site_src/topic/b.md",
        "---\ntitle: B\nminutes: 5\nyear: 2023\nkey_points: [new <thing>]\n---\n# B\n",
    )
    lesson.write(
        "site_src/topic/index.md",
        "---\ntitle: Topic\n---\n# Topic\n\n<!-- show: cards -->\n\n<!-- show: studies topic -->\n",
    )
    lesson.write("site_src/index.md", "# Home\n\n<!-- show: topics -->\n")
    build(lesson)
    index = lesson.text("topic/index.md")
    assert index.index("[**B**](../topic/b.md)") < index.index("[**A lesson**](../topic/a.md)")
    assert "What it is about" in index and "12 minutes" in index
    assert (
        '| [B](../topic/b.md) | 2023 | <span class="fp-points">new &lt;thing&gt;</span> |' in index
        and index.count("| [") == 1
    )
    assert "[**Topic**](topic/index.md)" in lesson.text("index.md")
    assert "[B](topic/b.md) · [A lesson](topic/a.md)" in lesson.text("index.md")


def test_counted_models_have_a_line_each_and_links_in_key_points_lead_on(lesson):
    record = """
from IPython.display import display
MIME = "application/vnd.forward-pass.proof+json"
for name, layers in (("Small <1B>", "2"), ("Large", "80")):
    facts = {"width": "4", "layers": layers}
    display({"text/plain": name, MIME: {"study": name, "facts": facts}}, raw=True)
assert layers
"""
    meta = "title: Counted\nyear: 2024\nkey_points: ['[a value](topic/a.md) & more', second]"
    lesson.page("models/m.md", record, meta=meta)
    lesson.write("site_src/models/n.md", "---\ntitle: Bare\nkey_points: [none]\n---\n# Bare\n")
    lesson.write(
        "site_src/models/index.md", "---\ntitle: M\n---\n# M\n\n<!-- show: studies models -->\n"
    )
    lesson.write("site_src/index.md", "# Home\n\n<!-- show: studies models -->\n")
    for run in ("first", "from the cache"):
        build(lesson)
        heads = "| Model | Year | Width | Layers | Key points | Equal to |"
        assert heads in lesson.text("models/index.md"), run  # as the page names them
    text = lesson.text("models/index.md")
    assert (
        '[Small &lt;1B&gt;](../models/m.md) | 2024 | 4 | 2 | <span class="fp-points">[a value](../topic/a.md) &amp; more; second</span> |  |'
        in text
    )
    assert "| [Large](../models/m.md) | 2024 | 4 | 80 | as above |  |" in text
    assert '| [Bare](../models/n.md) |  |  |  | <span class="fp-points">none</span> |  |' in text
    assert "[a value](topic/a.md)" in lesson.text("index.md")
    report = json.loads((lesson.root / "build/report.json").read_text())
    (entry,) = [page for page in report["pages"] if page["source"] == "models/m.md"]
    assert entry["assertions"] == 1  # to count a model proves nothing


@pytest.mark.parametrize(
    "meta",
    ["minutes: ten", "proves: a claim", "year: '2023'"],
)
def test_metadata_of_the_wrong_kind_is_named(lesson, meta):
    lesson.page("topic/a.md", "from snippets.topic.a import value\nassert value()", meta=meta)
    with pytest.raises(
        BuildFailed, match=f"topic/a.md:1: metadata: {meta.partition(':')[0]} can't be"
    ):
        build(lesson)


def test_the_origin_is_the_last_commit(tmp_path):
    assert Origin.of(tmp_path, Options()) == Origin()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    environment = {"GIT_COMMITTER_DATE": "2026-01-02T03:04:05Z", "PATH": "/usr/bin:/bin"}
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True, env=environment)
    origin = Origin.of(tmp_path, Options().at(None, "https://example.org/lab/"))
    assert origin.date == "2026-01-02" and len(origin.commit) == 40
    assert origin.repo_url == "https://example.org/lab" and origin.site_url == ""
