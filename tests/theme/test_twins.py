"""Each page as plain Markdown beside it, copied by a button, and llms.txt of all of them."""

import json
import re
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import expect

from tests.browser import watched
from theme import twins
from theme.plain import plain

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^[ \t]*(?P<ticks>`{3,}|~{3,}).*?^[ \t]*(?P=ticks)[ \t]*$", re.S | re.M)
CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)


def prose(text: str) -> str:
    return CODE.sub("", FENCED.sub("", text))


def published(site: Path) -> list[Path]:
    """The pages of the site that have a twin: all but the server's."""
    return [p for p in sorted(site.rglob("*.html")) if p.name != "404.html"]


def test_every_page_has_a_twin_and_says_so(site):
    assert len(published(site)) > 70
    for path in published(site):
        page, twin = path.read_text("utf-8"), path.with_suffix(".md")
        assert f'<link rel="alternate" type="text/markdown" href="{twin.name}">' in page, path
        assert page.count(f'<a class="twin" href="{twin.name}" type="text/markdown">') == 1, path
        front, _, body = twin.read_text("utf-8").removeprefix("---\n").partition("\n---\n")
        facts = yaml.safe_load(front)
        assert list(facts) == ["title", "description", "address", "commit"]
        assert facts["address"] == path.relative_to(site).as_posix()
        assert len(body) > 200 and re.search(r"^# \S", body, re.MULTILINE), path


def test_a_twin_has_nothing_of_this_generator(site):
    left = {
        "HTML": r"</?(div|span|p|br|a|td|tr|img|svg|script)\b[^>]*>",
        "classes": r"\{ ?[.#]\w|\{ ?\w+=",
        "a box": r"^ *(!!!|\?\?\?|===) ",
        "a comment": r"<!--",
        "mkdocstrings": r"^::: ",
        "the tags plugin": r"/slug \}",
        "this program": r"[\x02\x03]",
    }
    for path in published(site):
        twin = path.with_suffix(".md").read_text("utf-8")
        text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", prose(twin), flags=re.DOTALL)
        for what, pattern in left.items():
            found = re.search(pattern, text, re.MULTILINE)
            assert not found, f"{path}: {what}: {found and text[found.start() :][:90]}"
        heads = re.findall(r"^[ \t]*(?:`{3,}|~{3,})([^`\n]*)$", twin, re.MULTILINE)
        assert all(re.fullmatch(r"[\w+-]*", head) for head in heads), path


def test_a_twin_holds_code_outputs_formulas_and_figures(site):
    gqa = (site / "attention/gqa.md").read_text("utf-8")
    source = (ROOT / "snippets/attention/gqa.py").read_text("utf-8").rstrip()
    shown = re.sub(r"\n{3,}", "\n\n", source)  # as on the page
    assert f"`snippets/attention/gqa.py`\n\n```python\n{shown}\n```" in gqa
    assert "```text\nnumbers to cache per token, each head its own: 144\n" in gqa
    assert r"\operatorname{softmax}\!\left(\frac{Q_i K_j^\top}{\sqrt{k}} + M\right) V_j" in gqa
    figures = re.findall(r"(?<!!)\[Figure: [^\]]{20,}\]\(([^)]+\.png)\)", gqa)
    assert figures and all((site / "attention" / name).is_file() for name in figures)
    assert "**Solution**" in gqa and "| symbol | here | meaning |" in gqa
    api = (site / "reference/api/attention.md").read_text("utf-8")
    assert source in api
    tags = (site / "reference/tags.md").read_text("utf-8")
    assert re.search(r"## Llama\n\n(- .*\n)*- \[Llama\]\(\.\./models/llama\.md\)", tags)


def test_every_link_of_a_twin_leads_somewhere(site):
    checked = 0
    for path in [*published(site), site / "llms.txt", site / "llms-full.txt"]:
        twin = path.with_suffix(".md") if path.suffix == ".html" else path
        for target in LINK.findall(prose(twin.read_text("utf-8"))):
            if not re.match(r"\w+:|#", target):
                checked += 1
                file = twin.parent / target.partition("#")[0]
                assert file.is_file(), f"{twin.relative_to(site)}: {target}"
    assert checked > 2000


def test_the_script_brings_the_same_text(site):
    for path in published(site):
        script = path.with_suffix(".js").read_text("utf-8")
        text = re.fullmatch(r"document\.currentScript\.carried = (.*);\n", script, re.DOTALL)[1]
        assert json.loads(text) == path.with_suffix(".md").read_text("utf-8")


@pytest.mark.parametrize("way", ["server", "file"])
@pytest.mark.parametrize(
    "name", ["index", "attention/gqa", "attention/index", "reference/api/layers"]
)
def test_a_button_copies_the_page(site, browser, address, way, name):
    base = f"{site.as_uri()}/" if way == "file" else address
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab, troubles = watched(context, base)
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"{base}{name}.html")
    script = f"{base}{name}.js"
    assert script not in asked, "the text is loaded before it is wanted"
    button = tab.get_by_role("button", name="Copy page as Markdown")
    button.focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("status").filter(has_text="Copied")).to_be_visible()
    text = tab.evaluate("navigator.clipboard.readText()")
    assert text == (site / f"{name}.md").read_text("utf-8")
    assert asked.count(script) == 1
    assert button.evaluate("button => button === document.activeElement")
    context.close()
    assert not troubles, "\n".join(troubles)


def test_llms_txt_has_the_format_and_every_page_once(site):
    text = (site / "llms.txt").read_text("utf-8")
    head, *sections = text.split("\n## ")
    assert re.match(r"# Forward Pass\n\n> \S.*\n\n\S", head) and "\n#" not in head
    links = []
    for section in sections:
        title, _, body = section.partition("\n\n")
        assert title and "\n" not in title
        for line in body.strip().split("\n"):
            match = re.fullmatch(r"- \[([^\]]+)\]\(([^)]+\.md)\): (.{50,160})", line)
            assert match, line
            links.append(match[2])
    twins_of_all = [p.relative_to(site).with_suffix(".md").as_posix() for p in published(site)]
    assert sorted(links) == sorted(twins_of_all)
    assert sections[-1].startswith("Optional\n") and "reference/api/" in sections[-1]
    assert links.index("attention/gqa.md") < links.index("attention/mla.md")


def test_llms_full_txt_holds_every_lesson(site):
    text = (site / "llms-full.txt").read_text("utf-8")
    pages = re.findall(r"^---\n\nPage: (\S+)\n\n# ", text, re.MULTILINE)
    lessons = [
        p.relative_to(ROOT / "site_src").with_suffix(".html").as_posix()
        for p in (ROOT / "site_src").rglob("*")
        if p.suffix in (".md", ".ipynb") and re.search(r'^[ "]*minutes: ', p.read_text(), re.M)
    ]
    assert sorted(pages) == sorted(lessons) and len(lessons) > 50
    assert pages.index("layers/rmsnorm.html") < pages.index("models/llama.html")
    assert "](attention/multi_head.md)" in text and "](multi_head.md)" not in prose(text)


def test_with_an_address_links_are_whole(shell):
    shell.page("topic/a.md", "---\nminutes: 1\n---\n# A\n\n[B](b.md#here) [m](#me) ![x](p.svg)")
    shell.page("topic/b.md", "# B\n\n## Here\n\n[far](https://far.org/x)")
    shell.page("topic/p.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>")
    shell.edit("site_src/topic/a.md", "[m](#me)", "[m](#a)")
    code, output = shell.build(SITE_URL="https://example.org/book")
    assert code == 0, output
    twin = shell.html("topic/a.md")
    base = "https://example.org/book/topic"
    assert f"[B]({base}/b.md#here) [m](#a) [Figure: x]({base}/p.svg)" in twin
    assert f"address: {base}/a.html\n" in twin and "commit" not in twin
    assert "address: https://example.org/book/\n" in shell.html("index.md")
    assert "[far](https://far.org/x)" in shell.html("topic/b.md")
    assert f"]({base}/a.md)" in shell.html("llms.txt")
    assert f"Page: {base}/a.html" in shell.html("llms-full.txt")


def same(target: str) -> str:
    return target


@pytest.mark.parametrize(
    "markdown, text",
    {
        "# A { #a .b }\n\nWords { .fp-lead }": "# A\n\nWords",
        "[x](y){ .md-button } and $x_{.5}$": "[x](y) and $x_{.5}$",
        '??? tip "Hint"\n\n    One.\n\n    ```python\n    x\n    ```\n\nAfter': (
            "**Hint**\n\nOne.\n\n```python\nx\n```\n\nAfter"
        ),
        "!!! note\n\n    !!! tip\n        In.": "**Note**\n\n**Tip**\n\nIn.",
        '```` { .text .output .no-copy }\n```\n!!! note "x"\n````': (
            '````text\n```\n!!! note "x"\n````'
        ),
        '```python title="a.py" hl_lines="1"\nx = {"a": 1}  # { .b }\n```': (
            '`a.py`\n\n```python\nx = {"a": 1}  # { .b }\n```'
        ),
        "![A plot](p.png){ .output width=3 loading=lazy }": "[Figure: A plot](p.png)",
        "a `<div>` and `x[i](y){ .z }`": "a `<div>` and `x[i](y){ .z }`",
        '<div class="x" markdown="1">\n\nIn.\n\n</div>': "In.",
        '<a href="x">y</a><br><svg><title>no</title></svg> &lt;z&gt; it&#x27;s &eacute;': (
            "[y](x)  &lt;z&gt; it's é"
        ),
        "<table><tr><th></th><th>a|b</th></tr><tr><td>1</td><td><b>2</b></td></tr></table>": (
            "|  | a\\|b |\n|---|---|\n| 1 | **2** |"
        ),
        "<dl><dt>Word</dt><dd>What it is.</dd></dl>": "Word\n: What it is.",
        "a < b, <unknown> <https://x.org> x<y": "a < b, <unknown> <https://x.org> x<y",
        "a <!-- gone --> b\n\n::: snippets.x\n\nc": "a  b\n\nc",
        "[Notebook](n) · [Wrong?](https://h.org/o/r/issues/new?title=a)": "[Notebook](n)",
        '[a](b.md "A title")': "[a](b.md)",
    }.items(),
)
def test_plain(markdown, text):
    assert plain(markdown, same) == text + "\n"


def test_links_lead_from_where_they_stand():
    link = twins.leads("topic/a.md", "topic/a.md", "")
    assert link("b.md#x") == "b.md#x" and link("#y") == "#y" and link("../c.md") == "../c.md"
    link = twins.leads("topic/a.md", "llms-full.txt", "")
    assert link("b.md#x") == "topic/b.md#x" and link("#y") == "topic/a.md#y"
    assert link("../c.md") == "c.md" and link("https://x.org") == "https://x.org"
    assert twins.leads("topic/a.md", "topic/a.md", "https://h/")("../c.md") == "https://h/c.md"
