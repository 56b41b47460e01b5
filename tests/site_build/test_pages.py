"""What a page may hold: cells anywhere, options, outputs, figures, modules, notebooks."""

import json
from io import BytesIO

import numpy
import pytest
from matplotlib import pyplot
from matplotlib.image import imread

from site_build.figures import with_palette
from site_build.pages import SourceError, read_markdown, read_notebook
from site_build.render import png_size
from tests.site_build.conftest import JUPYTER

NESTED = """\
# Page

```python
import math
x = [1]
assert math.pi > 3
```

!!! note

    ```python
    x.append(2)
    print("in a note", x)
    ```

??? tip "Folded"

    === "Tab"

        ```python hide=source
        x.append(3)
        print("in a tab", x)
        ```

1. item

    ~~~python
    x.append(4)
    print("in a list", x)

    if x:
        print("indented")
    ~~~

````md
```python
raise SystemExit("an example of a fence is no cell")
```
````

```python no-run title="shown"
raise SystemExit("shown only")
```

<!--
```python
raise SystemExit("commented out")
```
-->

```python hide=output
print("never seen")
```

```python hide=all
print("neither seen"); y = 1
```

```bash
echo not python
```
"""


def notebook(*cells: tuple[str, str]) -> str:
    made = [
        {"cell_type": kind, "id": f"c{n}", "metadata": {}, "source": source}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for n, (kind, source) in enumerate(cells)
    ]
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5})


def test_every_python_fence_is_a_cell_wherever_it_stands(project):
    project.write("site_src/a.md", NESTED)
    project.build()
    text = project.text("a.md")
    assert project.about("a.md")["cells"] == 6
    for line in (
        "    in a note [1, 2]",
        "        in a tab [1, 2, 3]",
        "    in a list [1, 2, 3, 4]",
    ):
        assert f"\n{line}\n" in text
    assert "x.append(3)" not in text and "y = 1" not in text
    assert "\nnever seen" not in text and "\nneither seen" not in text
    assert '```python title="shown"\nraise SystemExit("shown only")' in text
    assert "```bash\necho not python\n```" in text


def test_the_site_shows_nested_outputs_inside_their_blocks(quick):
    quick.write("site_src/a.md", NESTED)
    code, output = quick.mkdocs("build")
    assert code == 0, output
    page = quick.site()["a/index.html"].decode()
    assert page.count('class="output no-copy highlight"') == 3
    assert (
        page.index('class="admonition note"') < page.index("in a note [") < page.index("<details")
    )


def test_a_notebook_and_a_markdown_page_come_out_alike(project):
    project.write(
        "site_src/a.md",
        "---\ntitle: T\n---\n# Page\n\n```python hide=source\nprint('x')\nassert print\n```\n\nText\n\n"
        '```python alt="A line"\nimport matplotlib.pyplot as plt\nassert plt.plot([1]);\n```\n',
    )
    cells = [
        ("raw", "---\ntitle: T\n---"),
        ("markdown", "# Page"),
        ("code", "#| hide: source\nprint('x')\nassert print"),
        ("markdown", "Text\n\n```python\nraise SystemExit('prose in a notebook')\n```"),
        ("code", '#| alt: "A line"\nimport matplotlib.pyplot as plt\nassert plt.plot([1]);'),
        ("code", ""),
    ]
    project.write("site_src/b.ipynb", notebook(*cells))
    project.build()
    prose = "```python\nraise SystemExit('prose in a notebook')\n```\n\n"
    a, b = project.text("a.md"), project.text("b.md").replace(prose, "")
    assert [
        x for x in a.replace("a-2-", "b-2-").replace("a.ipynb", "b.ipynb").split("\n") if x
    ] == [x for x in b.split("\n") if x]


def test_outputs(project):
    rich = (
        "from IPython.display import HTML, Markdown, SVG, display\n"
        "display(HTML('<table>\\n<tr><td>cell</td></tr>\\n</table>'))\n"
        "display(Markdown('| a |\\n|---|\\n| *b* |'))\nprint('between')\n{'last': 1}"
    )
    project.write(
        "site_src/a.md",
        f"```python\n{rich}\n```\n\n"
        "```python stderr\nimport sys\nprint('asked for', file=sys.stderr)\n```\n\n"
        "```python\n'unsaid';  # hidden\n```\n\n"
        "```python\nprint('not asked for', file=sys.stderr)\nprint('\\x1b[31mred\\x1b[0m')\n"
        "print('10%\\r100%')\nassert sys.stderr\n```\n\n"
        '```python alt="A box" caption="The *box*"\n'
        'SVG(\'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"></svg>\')\n```\n',
    )
    project.build()
    text = project.text("a.md")
    assert "<table><tr><td>cell</td></tr></table></div>" in text
    assert "\n| a |\n|---|\n| *b* |\n" in text
    order = ["<table>", "| *b* |", "between", "{'last': 1}", "asked for", "red\n100%", "![A box]"]
    assert [text.index(x) for x in order] == sorted(text.index(x) for x in order)
    assert "not asked for\n```" not in text and "\x1b" not in text
    assert text.count("unsaid") == 1  # in the source
    assert (
        '{ .output .figure width="40" height="30" loading=lazy }\n\nThe *box*\n{ .caption }' in text
    )


def test_a_figure_is_a_hashed_file_with_its_size(project):
    figure = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nassert ax.plot([1, 2]);"
    project.page("topic/a.md", figure, info='alt="A [bracketed] line"')
    project.build()
    (file,) = (project.root / "build/pages/topic").glob("a-1-*.png")
    assert (
        f'![A bracketed line]({file.name}){{ .output .figure width="680" height="360"'
        in project.text("topic/a.md")
    )
    project.edit("site_src/topic/a.md", "[1, 2]", "[2, 1]")
    project.build()
    (changed,) = (project.root / "build/pages/topic").glob("a-1-*.png")
    assert changed.name != file.name


IMAGES = """\
import matplotlib.pyplot as plt
fig = plt.figure(figsize=(8, 4))
left = fig.add_axes([0.1, 0.1, 0.2, 0.4])
shown = left.imshow([[0, 1], [1, 0]], aspect="auto")
assert fig.colorbar(shown, cax=fig.add_axes([0.4, 0.1, 0.05, 0.4]))
points = fig.add_axes([0.5, 0.5, 0.2, 0.4]).scatter([0, 1], [1, 0], c=[0, 1])
assert fig.colorbar(points, cax=fig.add_axes([0.8, 0.5, 0.05, 0.4]))"""


def test_a_figure_says_where_it_shows_images(project):
    project.page("a.md", IMAGES, info='alt="An image, its bar, and points with theirs"')
    project.page("b.md", IMAGES.replace("left.imshow", "left.pcolormesh").replace(
        ', aspect="auto"', ""), info='alt="A mesh"')  # fmt: skip
    project.page("c.md", "import matplotlib.pyplot as plt\nassert plt.plot([1])", info='alt="x"')
    project.build()
    boxes = "[[10.0, 50.0, 30.0, 90.0], [40.0, 50.0, 45.0, 90.0]]"
    assert f'data-images="{boxes}" loading=lazy }}' in project.text("a.md")
    assert f'data-images="{boxes}"' in project.text("b.md")
    assert "data-images" not in project.text("c.md")


def test_a_figure_is_ink_without_paper(project):
    project.page("a.md", "import matplotlib.pyplot as plt\nassert plt.plot([1, 2])", info='alt="x"')
    project.build()
    (file,) = (project.root / "build/pages").glob("a-1-*.png")
    shown = imread(file)
    assert shown.shape == (540, 1020, 4) and shown[2, 2, 3] == 0 and shown[300, 1000, 3] == 0


def test_a_figure_of_many_shades_keeps_its_colours_in_fewer_bytes():
    figure, axes = pyplot.subplots()
    for n in range(12):
        axes.plot([0, 1, 2], [n, 2 - n, n], label=f"line {n}")
        axes.fill_between([0, 2], n, n + 1, alpha=0.1)
    axes.legend()
    figure.savefig(drawn := BytesIO(), dpi=150, facecolor="none")
    pyplot.close(figure)
    small = with_palette(drawn.getvalue())
    assert len(small) < 0.6 * len(drawn.getvalue())
    before, after = (imread(BytesIO(png)) for png in (drawn.getvalue(), small))
    assert before.shape == after.shape and png_size(small) == png_size(drawn.getvalue())
    seen, shown = (picture[..., :3] * picture[..., 3:] for picture in (before, after))
    assert abs(seen - shown).mean() < 0.004 and abs(before[..., 3] - after[..., 3]).mean() < 0.004
    pixels, counts = numpy.unique(before.reshape(-1, 4), axis=0, return_counts=True)
    kept = {tuple(pixel) for pixel in numpy.unique(after.reshape(-1, 4), axis=0)}
    assert len(pixels) > 1000 and len(kept) <= 256
    assert {tuple(pixel) for pixel in pixels[counts.argsort()[-100:]]} <= kept


def test_a_module_is_shown_whole_with_links_to_source_and_test(quick):
    quick.write("tests/test_value.py", "def test_value(): ...\n")
    quick.write("site_src/deep/a.md", "# A\n\n<!-- show: snippets/value.py -->\n")
    code, output = quick.mkdocs("build")
    assert code == 0, output
    site = quick.site()
    page = site["deep/a/index.html"].decode()
    assert "snippets/value.py</span>" in page and "def</span>" in page
    assert 'href="../../snippets/value.py"' in page and 'href="../../tests/test_value.py"' in page
    assert site["snippets/value.py"] == (quick.root / "snippets/value.py").read_bytes()


def test_links_name_sources_and_reach_what_is_published(quick):
    quick.write("site_src/index.md", "# Home\n\n[n](deep/n.ipynb) [a](deep/n.ipynb#part)\n")
    cells = [
        ("markdown", "# N\n\n## Part\n\n[home](../index.md)"),
        ("code", "import math\nassert math.pi"),
    ]
    quick.write("site_src/deep/n.ipynb", notebook(*cells))
    quick.edit("mkdocs.yml", "docs_dir", "nav: [index.md, {N: deep/n.ipynb}]\ndocs_dir")
    code, output = quick.mkdocs("build")
    assert code == 0, output
    assert b'href="deep/n/#part"' in quick.site()["index.html"]


def test_pages_are_isolated_and_run_side_by_side(project):
    leak = "import builtins\nassert not hasattr(builtins, 'leak')\nbuiltins.leak = 1\n"
    meet = (
        "import pathlib, time\npathlib.Path('{}').touch()\nend = time.time() + 30\n"
        "while not pathlib.Path('{}').exists() and time.time() < end: time.sleep(0.01)\n"
        "assert pathlib.Path('{}').exists()"
    )
    project.page("a.md", leak + meet.format("here-a", "here-b", "here-b"))
    project.page("b.md", leak + meet.format("here-b", "here-a", "here-a"))
    project.build()


@pytest.mark.parametrize("look", ["site", "page"])
def test_a_notebook_in_the_classic_look(quick, look):
    """Executed by the engine, rendered by mkdocs-jupyter; the same source both ways."""
    front = "---\ntitle: N\nnotebook: classic\n---\n" if look == "page" else "---\ntitle: N\n---\n"
    cells = [
        ("raw", front),
        ("markdown", "# N"),
        ("code", "import math\nprint(6 * 7)\nassert math.pi"),
    ]
    quick.write("site_src/n.ipynb", notebook(*cells))
    quick.edit("mkdocs.yml", "markdown_extensions", JUPYTER + "markdown_extensions")
    if look == "site":
        quick.edit("mkdocs.yml", '"workers"', '"notebooks": "classic", "workers"')
    code, output = quick.mkdocs("build")
    assert code == 0, output
    classic = quick.site()["n/index.html"].decode()
    assert "jp-OutputArea" in classic and ">42\n" in classic
    if look == "site":
        quick.edit("mkdocs.yml", '"notebooks": "classic", ', "")
    else:
        quick.edit("site_src/n.ipynb", "notebook: classic\\n", "")
    code, output = quick.mkdocs("build")
    assert code == 0, output
    native = quick.site()["n/index.html"].decode()
    assert "jp-OutputArea" not in native and "42\n</code>" in native
    assert len(native) < 60_000 < len(classic)


def test_the_place_of_a_wrong_option():
    with pytest.raises(SourceError, match=r"a\.md:3: cell option alt needs a value"):
        read_markdown("a.md", "# A\n\n```python alt\nx\n```\n")
    with pytest.raises(SourceError, match=r"n\.ipynb:1: unknown cell option 'alter'"):
        read_notebook("n.ipynb", notebook(("code", "#| alter: x\n1")))
    with pytest.raises(SourceError, match="not a notebook"):
        read_notebook("n.ipynb", "{}")
