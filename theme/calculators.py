"""MkDocs hook: the calculators, their presets, and tables for readers without JavaScript.

Presets are the models that pages have counted (`study`), read from their configs. Each must come
out here with as many parameters and cache bytes as the page found on the model itself, else the
build fails with the page's name. A page asks by `<!-- calculator: NAME -->`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

from site_build.options import PLUGIN
from snippets.common.model_shape import shape_of
from snippets.reference.calculators import kv_cache, parameters
from theme.calculator_forms import FORMS, calculator, model_form
from theme.calculator_tables import TABLES, Preset, table

log = get_plugin_logger("calculators")
PAGE = "reference/calculators.md"
DATA = "assets/calculators_data.js"
CHIPS = "assets/chips.json"
SCRIPTS = (DATA, "assets/calculators_formulas.js", "assets/calculators.js")
MARK = re.compile(r"<!-- calculator: (?P<name>\w+) -->")
COUNTS = {"parameters": "total", "active": "active"}
models: list[Preset] = []  # of this build


def studied(engine) -> Iterable[tuple[str, dict]]:
    """Page and record of each language model that the pages have counted, in their order."""
    place = {stem: number for number, stem in enumerate(engine.order)}
    ordered = sorted(engine.entries, key=lambda page: place.get(page.rpartition(".")[0], 0))
    for page in ordered:
        for cell in engine.entries[page]["outputs"]:
            for output in cell:
                if "counted" in (record := output.get("proof", {})):
                    yield page, record


def preset(page: str, record: dict) -> Preset:
    """A counted model as its sizes.

    Raises:
        ValueError: the config can't be read, or what is computed isn't what was counted.
    """
    name, counted = record["study"], record["counted"]
    try:
        shape = shape_of(counted["config"])
    except ValueError as error:
        raise ValueError(
            f"{page}: {name} is no preset: {error} (snippets/common/model_shape.py reads configs)"
        ) from None
    found = {key: parameters(shape)[whole] for key, whole in COUNTS.items()}
    cache = kv_cache(shape, context=counted["context"], batch=1, bits=16)
    found["cache bytes"] = cache["bytes"]
    for key, value in found.items():
        if value != counted[key]:
            raise ValueError(
                f"{page}: {name} has {counted[key]:,} {key}, the calculators say {value:,}"
            )
    return Preset(name, page, shape)


def presets(engine) -> list[Preset]:
    found = []
    for page, record in studied(engine):
        try:
            found.append(preset(page, record))
        except ValueError as error:
            log.warning(str(error))
    return found


# MkDocs


def on_files(files, config):
    models.clear()
    if files.get_file_from_path(PAGE) is None:
        return files
    models.extend(presets(config.plugins[PLUGIN].engine))
    data = {"models": [{"name": m.name, "shape": asdict(m.shape)} for m in models]}
    data["chips"] = json.loads(Path(config.docs_dir, CHIPS).read_text("utf-8"))
    text = f"const calculatorsData = {json.dumps(data, separators=(',', ':'))};\n"
    files.append(File.generated(config, DATA, content=text))
    return files


def on_page_content(text, page, config, files):
    if not MARK.search(text):
        return text
    chips = json.loads(Path(config.docs_dir, CHIPS).read_text("utf-8"))
    up = "../" * page.file.src_uri.count("/")
    links = {}
    for m in models:
        target = files.get_file_from_path(m.page.rpartition(".")[0] + ".md")
        links[m.name] = target.url_relative_to(page.file) if target else ""

    def fill(match: re.Match) -> str:
        name = match["name"]
        if name in FORMS:
            return calculator(name, chips)
        if name in TABLES:
            return table(TABLES[name](models, chips), links) if models else ""
        if name == "model":
            return model_form([m.name for m in models])
        if name == "scripts":
            return "".join(f'<script src="{up}{script}"></script>' for script in SCRIPTS)
        known = ", ".join([*FORMS, *TABLES, "model", "scripts"])
        log.warning(f"{page.file.src_uri}: no calculator {name!r}; known: {known}")
        return ""

    return MARK.sub(fill, text)
