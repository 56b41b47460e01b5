"""MkDocs hook: where pages stand on the web, and where their sources can be edited.

Without `site_url` there is no sitemap, which would list nothing; without `repo_url` nothing can
be edited.
"""

import re
from pathlib import Path

from mkdocs.plugins import get_plugin_logger

from site_build.options import PLUGIN
from theme import api

log = get_plugin_logger("addresses")
FOOT = re.compile(r'(<div class="fp-foot".*?)(</p>\s*</div>)', re.DOTALL)
SITEMAP = ("sitemap.xml", "sitemap.xml.gz")


def on_config(config):
    if not config.repo_url:
        config.edit_uri = None  # MkDocs would warn that it leads nowhere
    return config


def on_files(files, config):
    """A notebook is published as Markdown, and edited as what it is."""
    folder = config.plugins[PLUGIN].engine.source
    for file in files.documentation_pages():
        notebook = f"{file.src_uri.removesuffix('.md')}.ipynb"
        if (folder / notebook).is_file():
            file.edit_uri = notebook
        elif topic := api.topic_of(file.src_uri):
            file.edit_uri = f"../snippets/{topic}"
        elif file.src_uri == api.INDEX:
            file.edit_uri = "../snippets"
    return files


def on_env(env, config, files):
    for file in files.documentation_pages():
        page = file.page
        if page.canonical_url:  # a folder's page has the folder's address
            page.canonical_url = re.sub(r"(?<=/)index\.html$", "", page.canonical_url)
        if page.edit_url and file.src_uri.startswith(api.FOLDER):
            page.edit_url = page.edit_url.replace("/edit/", "/tree/")  # a folder is looked at
        if config.repo_url and not page.edit_url:
            log.warning(f"{file.src_uri}: no edit_uri says where its source is edited")
    return env


def on_post_page(output, page, config):
    """The link stands in the foot, beside the one that reports an error."""
    if not page.edit_url:
        return output
    label = "See the modules" if page.file.src_uri.startswith(api.FOLDER) else "Edit this page"
    link = f'<a href="{page.edit_url}" rel="edit">{label}</a>'
    if FOOT.search(output):
        return FOOT.sub(lambda match: f"{match[1]} · {link}{match[2]}", output, count=1)
    return output.replace("</article>", f'<div class="fp-foot"><p>{link}</p></div></article>', 1)


def on_post_build(config):
    if not config.site_url:
        for name in SITEMAP:
            Path(config.site_dir, name).unlink(missing_ok=True)
