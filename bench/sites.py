"""The same site for each engine: notebooks, or the peer's own fences."""

import json
import shutil
from pathlib import Path

CELLS = [
    "import matplotlib.pyplot as plt\nimport torch\nfrom local_package import value",
    "torch.manual_seed({n})\nx = torch.randn(64, 64)\nx.shape",
    "y = torch.softmax(x @ x.T / 8, dim=-1)\nprint(y.sum(-1)[:4])\nassert y.shape == x.shape",
    "for row in y[:5]:\n    print(row[:6])",
    "fig, ax = plt.subplots()\nax.plot(y[0], label='page {n}')\nax.legend();",
    "print('value', value())\nassert value() == 1",
]
FIGURE_IN_MARKDOWN_EXEC = (
    "import base64, io\nfig, ax = plt.subplots()\nax.plot(y[0], label='page {n}')\nax.legend()\n"
    "buffer = io.BytesIO()\nfig.savefig(buffer, format='png')\nplt.close(fig)\n"
    "image = base64.b64encode(buffer.getvalue()).decode()\n"
    'print(f\'<img alt="A line" src="data:image/png;base64,{{image}}">\')'
)
PROSE = "## Part {k} of page {n}\n\nSome words on **what** the next cell does, and `why`.\n"
CONFIG = """\
site_name: Bench
theme: {{name: material, font: false}}
docs_dir: {docs}
plugins: [search{plugin}]
markdown_extensions: [attr_list, md_in_html, admonition, pymdownx.superfences]
"""
PLUGINS = {
    "forward-pass": ", {forward-pass: {workers: 2}}",
    "mkdocs-jupyter": ", {mkdocs-jupyter: {execute: true, allow_errors: false}}",
    "markdown-exec": ", markdown-exec",
    "none": "",
}


def make_site(root: Path, engine: str, pages: int) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    docs = "docs" if engine == "none" else "site_src"
    (root / "mkdocs.yml").write_text(CONFIG.format(docs=docs, plugin=PLUGINS[engine]))
    (root / "local_package.py").write_text("def value():\n    return 1\n")
    if engine == "none":
        return root
    (root / docs).mkdir()
    (root / docs / "index.md").write_text("# Bench\n")
    for n in range(pages):
        if engine == "markdown-exec":
            (root / docs / f"page{n:03}.md").write_text(markdown(n))
        else:
            (root / docs / f"page{n:03}.ipynb").write_text(notebook(n))
    return root


def markdown(n: int) -> str:
    cells = [*CELLS]
    cells[4] = FIGURE_IN_MARKDOWN_EXEC
    cells[1] = cells[1].replace("x.shape", "print(x.shape)")
    fence = '```python exec="on" source="above" session="page{n}"{html}\n{code}\n```\n'
    parts = [f"# Page {n}\n"]
    for k, code in enumerate(cells):
        html = "" if k == 4 else ' result="text"'
        parts += [PROSE.format(k=k, n=n), fence.format(n=n, html=html, code=code.format(n=n))]
    return "\n".join(parts)


def notebook(n: int) -> str:
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# Page {n}"}]
    for k, code in enumerate(CELLS):
        code = code.format(n=n)
        if k == 4:
            code = f"#| alt: A line\n{code}"
        prose = {"cell_type": "markdown", "id": f"p{k}", "metadata": {}}
        cells.append(prose | {"source": PROSE.format(k=k, n=n)})
        run = {"cell_type": "code", "id": f"c{k}", "metadata": {}, "source": code}
        cells.append(run | {"outputs": [], "execution_count": None})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5})
