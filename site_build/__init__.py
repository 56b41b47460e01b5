"""The page engine: runs the pages' cells and writes plain Markdown for MkDocs to publish.

pages.py        reads a .md or .ipynb source into prose and cells
options.py      typed options, from mkdocs.yml
engine.py       decides what runs, gates what may be published, writes the report
cache.py        results on disk, and when one is still valid
forkserver.py   runs pages in forked children (Linux)
kernels.py      runs pages in Jupyter kernels (anywhere)
shell.py        runs one page's cells inside such a child
recorder.py     inside the page's process: what it used, asserted and warned about
figures.py      where figures show images, and smaller files of the others
assertions.py   which assertions count
matplotlibrc    the look of the figures
outputs.py      outputs without what differs between machines and runs
facts.py        what pages say about themselves: head, foot, cards, tables of pages
render.py       cells and outputs to Markdown and image files
source.py       a Python file edited in place; jaxtyping's shapes as comments
flatten.py      a module as one file to copy
notebook.py     a page as a notebook to download
publish.py      the lock, and the swap of a finished site
plugin.py       the thin MkDocs plugin
__main__.py     the stages without MkDocs
"""
