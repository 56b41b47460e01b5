"""A griffe extension: what the API pages show of the modules, and how it reads."""

import re

import griffe

AXES = re.compile(r"^Axes: *(.+(?:\n.+)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_attribute(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """Submodules and constants explain themselves in the source, or have a docstring.

        The fields of a configuration are the exception: its users need all of them.
        """
        if not attr.docstring and not is_field(attr):
            attr.public = False

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        for parameter in func.parameters:
            parameter.annotation = as_written(parameter.annotation)
        func.returns = as_written(func.returns)

    def on_module(self, *, mod: griffe.Module, **kwargs) -> None:
        """The legend of the axes is a paragraph, however its lines are indented."""
        if mod.docstring:
            mod.docstring.value = AXES.sub(
                lambda match: f"**Axes:** {' '.join(match[1].split())}", mod.docstring.value
            )


def is_field(attr: griffe.Attribute) -> bool:
    return attr.parent.is_class and "dataclass" in attr.parent.labels


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
