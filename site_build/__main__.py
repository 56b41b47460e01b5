"""The engine without MkDocs: `python -m site_build execute | build`.

execute runs what must run and fills the cache; build also writes the plain Markdown tree.
"""

import argparse
import sys
from pathlib import Path

from .engine import BuildFailed, Engine
from .options import read_mkdocs_yml


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m site_build", description=__doc__)
    parser.add_argument("stage", choices=["execute", "build"])
    parser.add_argument("--config", type=Path, default=Path("mkdocs.yml"), help="mkdocs.yml")
    parser.add_argument("--output", type=Path, help="the tree; default: build/pages")
    arguments = parser.parse_args()
    try:
        source, options, order = read_mkdocs_yml(arguments.config)
        root = arguments.config.parent
        engine = Engine(root, source, options, arguments.output, order=order)
        engine.build(write=arguments.stage == "build")
    except (BuildFailed, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
