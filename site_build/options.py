"""The engine's options: typed, with one place for names and defaults."""

import dataclasses
import difflib
import os
import sys
from pathlib import Path

import yaml
from yaml_env_tag import construct_env_tag

PLUGIN = "forward-pass"
LINUX = sys.platform.startswith("linux")
CHOICES = {"backend": ("auto", "fork", "kernel"), "notebooks": ("native", "classic")}


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands below `forward-pass:` in mkdocs.yml."""

    build: str = "build"  # results, generated pages and the report go here
    backend: str = "auto"  # fork, kernel, or auto: fork on Linux, kernel elsewhere
    workers: int = os.cpu_count() or 1  # pages that run at the same time
    preload: list = dataclasses.field(default_factory=lambda: ["torch", "matplotlib.pyplot"])
    # Modules whose `prepare(root)` makes files that pages read; quick when they are there.
    prepare: list = dataclasses.field(default_factory=list)
    cpu_seconds: float = 20.0  # a page's budget, unless its metadata says otherwise
    study_cpu_seconds: float = 120.0  # the same for pages marked `study`
    notebooks: str = "native"  # or classic: executed notebooks go to mkdocs-jupyter
    site_url: str = ""  # these two are MkDocs' own, from the top of mkdocs.yml
    repo_url: str = ""
    notebook_branch: str = ""  # where the repository holds the site's carry/, for Colab
    serve_wait: float = 10.0  # under serve, seconds that a rebuild waits for edited pages

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            allowed = (int, float) if field.type is float else field.type
            if not isinstance(value, allowed) or isinstance(value, bool):
                kind = field.type.__name__
                raise ValueError(f"{PLUGIN}: {name} must be of type {kind}, not {value!r}")
            if name in CHOICES and value not in CHOICES[name]:
                allowed = ", ".join(CHOICES[name])
                raise ValueError(f"{PLUGIN}: {name} must be one of {allowed}, not {value!r}")
            if field.type in (int, float) and value <= 0:
                raise ValueError(f"{PLUGIN}: {name} must be above 0, not {value}")
        if self.backend == "fork" and not LINUX:
            raise ValueError(f"{PLUGIN}: backend fork needs Linux; this is {sys.platform}")

    @classmethod
    def of(cls, settings: dict | None) -> "Options":
        """From the plugin's settings; an unknown name is an error that says what was meant."""
        settings = settings or {}
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
                raise ValueError(f"{PLUGIN}: unknown option {name!r}; {hint}")
        return cls(**settings)

    def at(self, site_url: str | None, repo_url: str | None) -> "Options":
        site_url = site_url and site_url.rstrip("/") + "/"
        repo_url = (repo_url or "").rstrip("/")
        return dataclasses.replace(self, site_url=site_url or "", repo_url=repo_url)

    @property
    def forks(self) -> bool:
        return self.backend == "fork" or (self.backend == "auto" and LINUX)


def stems(nav) -> list[str]:
    """The pages of a navigation in its order, without suffix."""
    if isinstance(nav, str):
        return [nav.rpartition(".")[0]]
    items = nav.values() if isinstance(nav, dict) else nav or []
    return [stem for item in items for stem in stems(item)]


def read_mkdocs_yml(path: Path) -> tuple[Path, Options, list[str]]:
    """The folder of the pages, the engine's options, the pages' order; without MkDocs."""

    class Loader(yaml.SafeLoader):
        """Takes MkDocs' own tags (!!python/name) for nothing: none is of ours."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    Loader.add_constructor("!ENV", construct_env_tag)
    config = yaml.load(path.read_text("utf-8"), Loader)
    plugins = config.get("plugins") or []
    settings = [p[PLUGIN] for p in [plugins, *plugins] if isinstance(p, dict) and PLUGIN in p]
    options = Options.of(*settings or [None]).at(config.get("site_url"), config.get("repo_url"))
    return path.parent / config.get("docs_dir", "docs"), options, stems(config.get("nav"))
