"""A griffe extension: what the API pages show of the modules, and how it reads."""

import re

import griffe

AXES = re.compile(r"^Axes: *(.+(?:\n.+)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_attribute(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """Submodules, constants, fields: without a docstring a signature or the source says all."""
        if not attr.docstring and "property" not in attr.labels:
            attr.public = False

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        if func.name == "__post_init__":  # nobody calls it; what it refuses its class says
            func.public = False
        for parameter in func.parameters:
            parameter.annotation = as_written(parameter.annotation)
        func.returns = as_written(func.returns)

    def on_module(self, *, mod: griffe.Module, **kwargs) -> None:
        """The legend of the axes is a paragraph, however its lines are indented."""
        if mod.docstring:
            mod.docstring.value = AXES.sub(
                lambda match: f"**Axes:** {' '.join(match[1].split())}", mod.docstring.value
            )


def as_written(annotation):
    """A shape in the quotes that the source has; griffe gives Python's own."""
    if isinstance(annotation, str):
        return annotation.replace("'", '"')
    if isinstance(annotation, griffe.ExprTuple):
        annotation.elements = [as_written(element) for element in annotation.elements]
    for part in ("slice", "left", "right"):  # of Float[...] and of ... | None
        if hasattr(annotation, part):
            setattr(annotation, part, as_written(getattr(annotation, part)))
    return annotation
