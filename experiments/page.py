"""One self-contained page of HTML: opens from a disk, asks nobody for anything, and reads well without its script.

Every word that comes from outside is escaped. A Content-Security-Policy allows the page's own style and script by
their SHA-256, pictures that lie in the page itself, and nothing else: no request leaves it, and a script that got in by
a name would not run (https://www.w3.org/TR/CSP3/). The same content gives the same bytes; there is no time in it.
"""

import base64
import hashlib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

from experiments.page_parts import SCRIPT, STYLE
from experiments.run import replacing

LARGEST = 8 << 20  # bytes of a picture that is put into a page
_KINDS = {b"\x89PNG": "image/png", b"GIF8": "image/gif", b"\xff\xd8\xff": "image/jpeg"}


class Part(Protocol):
    """Anything that stands in a section."""

    def html(self) -> str:
        """As HTML, escaped."""


@dataclass(frozen=True)
class Words:
    """Paragraphs of text, apart where an empty line is."""

    text: str

    def html(self) -> str:
        """As HTML."""
        return "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in self.text.split("\n\n")) + "\n"


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: tuple[str, ...]

    def html(self) -> str:
        """As HTML."""
        return "<ul>\n" + "".join(f"<li>{escape(text)}</li>\n" for text in self.texts) + "</ul>\n"


@dataclass(frozen=True)
class Settings:
    """A long text, such as a configuration, that opens on a click."""

    title: str
    text: str

    def html(self) -> str:
        """As HTML."""
        return f"<details><summary>{escape(self.title)}</summary>\n<pre>{escape(self.text)}</pre></details>\n"


@dataclass(frozen=True)
class Figure:
    """A picture (PNG, GIF or JPEG), put into the page; where that can't be, the page says so."""

    path: Path
    caption: str

    def html(self) -> str:
        """As HTML."""
        words, kind = escape(self.caption), ""
        try:
            picture = f'<img src="{data_uri(Path(self.path))}" alt="{words}">'
            kind = ' class="wide"' * is_wide(Path(self.path))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            picture = f'<p class="missing">{escape(Path(self.path).name)}: {escape(reason)}</p>'
        return f"<figure{kind}>{picture}<figcaption>{words}</figcaption></figure>\n"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many abreast as there is room for."""

    figures: tuple[Figure, ...]

    def html(self) -> str:
        """As HTML."""
        return f'<div class="gallery">\n{"".join(figure.html() for figure in self.figures)}</div>\n'


@dataclass(frozen=True)
class Section:
    """A heading, empty for none, and what stands below it."""

    title: str
    parts: tuple[Part, ...]

    def html(self) -> str:
        """As HTML."""
        heading = f"<h2>{escape(self.title)}</h2>\n" if self.title else ""
        return f"<section>\n{heading}{''.join(part.html() for part in self.parts)}</section>\n"


@dataclass(frozen=True)
class Page:
    """A page of sections."""

    title: str
    sections: tuple[Section, ...]

    def html(self) -> str:
        """The whole file, HTML 5."""
        policy = (
            f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        title = escape(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n<main>\n<h1>{title}</h1>\n{''.join(section.html() for section in self.sections)}</main>\n"
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the file, whose folder is made; a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(self.html().encode())
        return path


def data_uri(path: Path) -> str:
    """A picture as an address that contains it. Raises ``OSError``, and ``ValueError`` for what can't be put in."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"too large for a page ({size:,} bytes, at most {LARGEST:,})")
    content = path.read_bytes()
    kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
    if kind is None:
        raise ValueError("expected a PNG, GIF or JPEG picture, found something else")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def is_wide(path: Path) -> bool:
    """Whether a PNG is so wide that it needs a line of its own, by its header."""
    with path.open("rb") as file:
        start = file.read(24)
    width, height = (int.from_bytes(start[i : i + 4], "big") for i in (16, 20))
    return start.startswith(b"\x89PNG") and 2 * width > 3 * height


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
