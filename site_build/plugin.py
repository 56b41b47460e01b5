"""The MkDocs plugin: has the engine write the pages, MkDocs publish them, then swaps."""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import markdown
from filelock import FileLock, Timeout
from mkdocs.exceptions import PluginError
from mkdocs.plugins import BasePlugin, event_priority, get_plugin_logger

from .engine import BuildFailed, Engine
from .options import PLUGIN, Options, stems
from .publish import discard, publish, staging

log = get_plugin_logger(PLUGIN)


class PagesPlugin(BasePlugin):
    # MkDocs keeps a plugin object over the rebuilds of `serve` when it has on_startup.

    def load_config(self, options, config_file_path=None):
        try:
            self.config = Options.of(options)
        except ValueError as error:
            return [(PLUGIN, error)], []
        return [], []

    def on_startup(self, *, command, dirty):
        context = click.get_current_context(silent=True)
        # `serve --clean` says that its command is build
        self.serving = "serve" in (command, context and context.info_name)
        self.engine = self.lock = self.folder = self.server = None
        self.watched = set()
        self.complete = False

    def on_config(self, config):
        root = Path(config.config_file_path).parent
        if self.engine is None:
            self._start(root, config)
        if self.serving:
            config.strict = False  # a broken page shows its error, the others are served
        else:
            if config.strict:  # -q drops warnings before strict mode can count them
                logger = logging.getLogger("mkdocs")
                logger.setLevel(min(logger.level, logging.WARNING))
            config.site_dir = str(staging(self.site))
        config.docs_dir = str(self.engine.output)
        self.engine.order = stems(config.nav)
        return config

    def _start(self, root: Path, config) -> None:
        set_build_date(root)

        def meanwhile():  # load what MkDocs needs next
            extensions = dict(
                extensions=config.markdown_extensions, extension_configs=config.mdx_configs
            )
            markdown.Markdown(**extensions).convert("```python\nx\n```")

        source = Path(config.docs_dir)
        self.config = self.config.at(config.site_url, config.repo_url)
        self.site = Path(config.site_dir).absolute()
        if self.serving:
            self.folder = Path(tempfile.mkdtemp(prefix="forward-pass-"))
            self.stamp = self.folder / "stamp"  # MkDocs rebuilds when it changes
            self.stamp.touch()
            pages = self.folder / "pages"
            self.engine = Engine(root, source, self.config, pages, log.info, self._wake)
            self.engine.warm_up()
        else:
            self.engine = Engine(root, source, self.config, log=log.info, meanwhile=meanwhile)
            self.lock = FileLock(self.engine.folder / "lock")
            self.engine.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=0)
            except Timeout:
                log.info("waiting for another build of this project")
                self.lock.acquire()
        self.engine.output.mkdir(parents=True, exist_ok=True)

    def on_pre_build(self, config):
        try:
            if self.serving:
                # The first pages are there at once; after an edit, one rebuild shows it.
                self.engine.refresh(self.config.serve_wait if self.complete else 0)
            else:
                self.engine.build()
        except BuildFailed as error:
            raise PluginError(str(error)) from None
        config.nav = published(config.nav, self.engine.suffixes)

    def on_serve(self, server, *, config, builder):
        server.unwatch(config.docs_dir)  # generated: each rebuild would start another
        for path in (self.engine.source, self.engine.root / "snippets", self.stamp):
            if path.exists():
                server.watch(str(path))
        self.server = server
        self._watch_used()
        return server

    @event_priority(-100)
    def on_post_build(self, config):
        self.complete = True
        if self.server:
            self._watch_used()

    def _wake(self):
        """Have MkDocs rebuild; again and again, since it may not be watching yet."""

        def touch():
            while self.engine.has_news():
                self.stamp.touch()
                time.sleep(2)

        threading.Thread(target=touch, daemon=True).start()

    def _watch_used(self):
        """Rebuild when a file changes that a page used, wherever it is."""
        uses = [entry["uses"].items() for entry in self.engine.entries.values()]
        # What was absent may be no path at all: IPython looks for a file named as a text.
        used = {key for group in uses for key, state in group if state != "absent"}
        for key in used - self.watched:
            path = self.engine.root / key
            if path.is_file() and not path.is_relative_to(self.engine.root / "snippets"):
                self.server.watch(str(path))
        self.watched |= used

    def on_shutdown(self):
        if self.engine is None:
            return
        self.engine.close()
        if self.lock and self.lock.is_locked:  # not while another build has it
            # MkDocs calls this in a `finally`: strict mode's abort is known only here.
            if self.complete and sys.exc_info()[0] is None:
                publish(self.site)
            discard(self.site)
            self.lock.release()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def published(nav, suffixes: dict[str, str]):
    """The navigation with notebooks under the names that they are published by."""
    if isinstance(nav, list):
        return [published(item, suffixes) for item in nav]
    if isinstance(nav, dict):
        return {title: published(item, suffixes) for title, item in nav.items()}
    if isinstance(nav, str) and nav.endswith(".ipynb"):
        stem = nav.removesuffix(".ipynb")
        return f"{stem}.{suffixes.get(stem, 'ipynb')}"
    return nav


def set_build_date(root: Path) -> None:
    """Dates on the site are the commit's, so that a commit has one site."""
    if "SOURCE_DATE_EPOCH" not in os.environ:
        git = ["git", "-C", str(root), "log", "-1", "--format=%ct"]
        with contextlib.suppress(OSError):
            done = subprocess.run(git, capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip():
                os.environ["SOURCE_DATE_EPOCH"] = done.stdout.strip()
