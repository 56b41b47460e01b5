"""The engine's options: typed, with one place for names and defaults."""

import dataclasses
import difflib
import os
import sys
from pathlib import Path

import yaml

PLUGIN = "forward-pass"


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands below `forward-pass:` in mkdocs.yml."""

    build: str = "build"  # results, generated pages and the report go here
    backend: str = "auto"  # fork, kernel, or auto: fork on Linux, kernel elsewhere
    workers: int = os.cpu_count() or 1  # pages that run at the same time
    preload: list = dataclasses.field(default_factory=lambda: ["torch", "matplotlib.pyplot"])
    cpu_seconds: float = 10.0  # a page's budget, unless its metadata says otherwise
    study_cpu_seconds: float = 120.0  # the same for pages marked `study`
    notebooks: str = "native"  # or classic: executed notebooks go to mkdocs-jupyter
    serve_wait: float = 10.0  # under serve, seconds that a rebuild waits for edited pages

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            allowed = (int, float) if field.type is float else field.type
            if not isinstance(value, allowed) or isinstance(value, bool):
                kind = field.type.__name__
                raise ValueError(f"{PLUGIN}: {field.name} must be of type {kind}, not {value!r}")
        for name, choices in (
            ("backend", ("auto", "fork", "kernel")),
            ("notebooks", ("native", "classic")),
        ):
            if getattr(self, name) not in choices:
                allowed = ", ".join(choices)
                raise ValueError(
                    f"{PLUGIN}: {name} must be one of {allowed}, not {getattr(self, name)!r}"
                )
        for name in ("workers", "cpu_seconds", "study_cpu_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{PLUGIN}: {name} must be above 0, not {getattr(self, name)}")
        if self.backend == "fork" and not sys.platform.startswith("linux"):
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

    @property
    def forks(self) -> bool:
        linux = sys.platform.startswith("linux")
        return self.backend == "fork" or (self.backend == "auto" and linux)


def read_mkdocs_yml(path: Path) -> tuple[Path, Options]:
    """The folder of the pages and the engine's options, without MkDocs."""

    class Loader(yaml.SafeLoader):
        """Takes MkDocs' own tags (!ENV, !!python/name) for nothing: none is of ours."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    config = yaml.load(path.read_text("utf-8"), Loader)
    plugins = config.get("plugins") or {}
    if isinstance(plugins, list):
        plugins = {
            k: v for p in plugins for k, v in (p if isinstance(p, dict) else {p: {}}).items()
        }
    return path.parent / config.get("docs_dir", "docs"), Options.of(plugins.get(PLUGIN))
