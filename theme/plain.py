"""A page's Markdown without what only this site's generator reads.

What is left is what any program or person reads as it stands: boxes become paragraphs below their
title, figures become links, tables in HTML become tables in Markdown, and classes are gone. Code,
formulas and diagrams stay as they are.
"""

import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser

FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})(?P<info>[^`]*)$")
LANGUAGE = re.compile(r"[{ .]*([\w+-]*)")
TITLE = re.compile(r'\btitle="([^"]*)"')
BOX = re.compile(
    r'^(?P<indent> *)(?:!!!|\?\?\?\+?|===)[ +]+(?P<kind>[\w ]*?) *(?:"(?P<title>.*)")?[ ]*$'
)
# What is no prose: code between ticks, and formulas as arithmatex finds them.
VERBATIM = re.compile(
    r"(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)"
    r"|\$\$.+?\$\$|(?<![\\$])\$(?![\s$])(?:(?!\n\n)[^$])*?(?<![\s\\])\$",
    re.DOTALL,
)
STORED = re.compile("\x02(\\d+)\x03")
VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s}"']+)"""
CLASSES = re.compile(
    rf"[ \t]*\{{:?[ ]*(?:[.#][\w:.-]+|[\w-]+={VALUE})"
    rf"(?:[ ]+(?:[.#][\w:.-]+|[\w-]+(?:={VALUE})?))*[ ]*\}}"
)
DIRECTIVE = re.compile(r"^:::[ ].*$", re.MULTILINE)  # mkdocstrings': the source stands below it
LINK = re.compile(r"(?<=\]\()<?([^)\s>]+)>?(?:\s+(?:\"[^\"]*\"|'[^']*'))?(?=\))")
IMAGE = re.compile(r"!\[([^\]]*)\](?=\()")
COMPLAINT = re.compile(r"(?: · )?\[[^\]]*\]\([^)\s]*/issues/new\?[^)]*\)")
UNSEEN = {"script", "style", "svg", "template", "button", "select", "textarea", "noscript"}
MARKS = {"strong": "**", "b": "**", "em": "*", "i": "*", "summary": "**", "code": "`"}
TAGS = {
    "a", "abbr", "article", "aside", "audio", "br", "canvas", "caption", "cite", "col", "colgroup",
    "data", "dd", "del", "details", "dfn", "dialog", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "iframe",
    "img", "input", "ins", "kbd", "label", "legend", "li", "main", "mark", "meter", "nav", "ol",
    "option", "output", "p", "picture", "pre", "progress", "q", "s", "samp", "section", "small",
    "source", "span", "sub", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "time", "tr",
    "u", "ul", "var", "video", *MARKS,
}  # fmt: skip


def plain(markdown: str, link: Callable[[str], str]) -> str:
    """The whole of a page's Markdown as plain Markdown; `link` gives each link's new target."""
    store: list[str] = []

    def keep(text: str) -> str:
        store.append(text)
        return f"\x02{len(store) - 1}\x03"

    text = "\n".join(with_fences(unboxed(markdown.split("\n")), keep))
    text = VERBATIM.sub(lambda match: keep(match[0]), text)
    text = CLASSES.sub("", DIRECTIVE.sub("", text))
    text = without_html(COMPLAINT.sub("", IMAGE.sub(r"[Figure: \1]", text)))
    text = LINK.sub(lambda match: link(match[1]), text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    while STORED.search(text):
        text = STORED.sub(lambda match: store[int(match[1])], text)
    return text + "\n"


def closing(lines: list[str], at: int, ticks: str) -> int:
    """The line that closes the fence opened at `at`; the last one where none does."""
    end = re.compile(rf"^[ \t]*{ticks[0]}{{{len(ticks)},}}[ \t]*$")
    return next((i for i in range(at + 1, len(lines)) if end.match(lines[i])), len(lines) - 1)


def unboxed(lines: list[str]) -> list[str]:
    """Admonitions, foldable boxes and tabs as paragraphs below their title."""
    done, at = [], 0
    while at < len(lines):
        if opening := FENCE.match(lines[at]):
            end = closing(lines, at, opening["ticks"]) + 1
            done += lines[at:end]
        elif box := BOX.match(lines[at]):
            inside, end = box["indent"] + " " * 4, at + 1
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith(inside)):
                end += 1
            body = [line.removeprefix(" " * 4) for line in lines[at + 1 : end]]
            title = box["title"] if box["title"] is not None else box["kind"].capitalize()
            done += [f"{box['indent']}**{title}**" if title else "", "", *unboxed(body), ""]
        else:
            end = at + 1
            done.append(lines[at])
        at = end
    return done


def with_fences(lines: list[str], keep) -> list[str]:
    """Code blocks kept whole, with their language only; a title stands above its block."""
    done, at = [], 0
    while at < len(lines):
        opening = FENCE.match(lines[at])
        if not opening:
            done.append(lines[at])
            at += 1
            continue
        end = closing(lines, at, opening["ticks"])
        title = TITLE.search(opening["info"])
        done += [f"{opening['indent']}{keep(f'`{title[1]}`')}", ""] if title else []
        language = LANGUAGE.match(opening["info"].strip())[1]
        head = f"{opening['indent']}{opening['ticks']}{language}"
        done.append(keep("\n".join([head, *lines[at + 1 : end + 1]])))
        at = end + 1
    return done


def without_html(text: str) -> str:
    parser = Html()
    parser.feed(text)
    parser.close()
    return parser.text()


class Html(HTMLParser):
    """Markdown with HTML in it, to Markdown. What only looks like a tag stays."""

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.out: list[list[str]] = [[]]  # of the page, and of each cell that is open
        self.unseen = 0
        self.links: list[str | None] = []
        self.rows: list[list[str]] = []

    def text(self) -> str:
        return "".join(self.out[0])

    def write(self, text: str) -> None:
        if not self.unseen:
            self.out[-1].append(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in UNSEEN:
            self.unseen += 1
        elif tag not in TAGS:
            self.write(self.get_starttag_text())
        elif tag == "a":
            self.links.append(attrs.get("href"))
            self.write("[" if attrs.get("href") else "")
        elif tag == "img":
            self.write(f"[Figure: {attrs.get('alt') or ''}]({attrs.get('src')})")
        elif tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.out.append([])
        elif re.fullmatch("h[1-6]", tag):
            self.write(f"\n\n{'#' * int(tag[1])} ")
        else:
            self.write({"br": " ", "li": "\n- ", "dt": "\n\n", "dd": "\n: "}.get(tag, ""))
            self.write(MARKS.get(tag, ""))

    def handle_startendtag(self, tag, attrs):
        if tag not in UNSEEN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in UNSEEN:
            self.unseen = max(0, self.unseen - 1)
        elif tag not in TAGS:
            self.write(f"</{tag}>")
        elif tag == "a":
            target = self.links.pop() if self.links else None
            self.write(f"]({target})" if target else "")
        elif tag in ("td", "th") and len(self.out) > 1 and self.rows:
            cell = " ".join("".join(self.out.pop()).split())
            self.rows[-1].append(re.sub(r"(?<!\\)\|", r"\|", cell))
        elif tag == "table" and self.rows:
            self.write(f"\n\n{table(self.rows)}\n\n")
        elif re.fullmatch("h[1-6]|p|dl|ul|ol", tag):
            self.write("\n\n")
        else:
            self.write(MARKS.get(tag, ""))

    def handle_data(self, data):
        self.write(data)

    def handle_entityref(self, name):
        self.write_character(f"&{name};")

    def handle_charref(self, name):
        self.write_character(f"&#{name};")

    def write_character(self, reference: str) -> None:
        """As itself, unless a tag would begin with it."""
        character = unescape(reference)
        self.write(reference if character in "<>&" else character)


def table(rows: list[list[str]]) -> str:
    width = max(map(len, rows))
    lines = [f"| {' | '.join(row + [''] * (width - len(row)))} |" for row in rows if row]
    return "\n".join([lines[0], f"|{'---|' * width}", *lines[1:]])
