"""Emoji without a CDN: the theme's icons as SVG in the page, all others as characters."""

from material.extensions import emoji as material
from pymdownx import emoji as plain

index = material.twemoji


def generator(index, shortname, alias, uc, *rest):
    draw = plain.to_alt if uc else material.to_svg
    return draw(index, shortname, alias, uc, *rest)
