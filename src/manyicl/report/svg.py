"""Templates, and figures as parts of a page: text stays text, colours follow the theme, no inline styles."""

from __future__ import annotations

import importlib.resources
import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import jinja2
from markupsafe import Markup

from manyicl.console import tell_rate
from manyicl.evaluation import tell_shot_count
from manyicl.report import numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholder colours that no plot uses otherwise; each becomes a variable of the page's style sheet.
INK, MUTED, LINE, PAPER = "#0a0b00", "#0a0b01", "#0a0b02", "#0a0b03"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
NUM_ARM_COLOURS = 8
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_ROOT = re.compile(r":root\{([^}]*)\}")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def read_part(name: str) -> str:
    """Return a template, style sheet or script from this module's folder."""
    return importlib.resources.files("manyicl.report").joinpath(name).read_text(encoding="utf-8")


def make_environment(**options: Any) -> jinja2.Environment:
    """Return an environment for this folder's templates, with every function that tells a number as a filter.

    options: those of jinja2.Environment that differ between a page and a card.
    """
    loader = jinja2.FunctionLoader(read_part)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, loader=loader, **options)
    environment.filters |= {name: getattr(numbers, name) for name in vars(numbers) if name.startswith("tell_")}
    environment.filters |= {
        "count_noun": numbers.count_noun,
        "tell_rate": tell_rate,
        "tell_shot_count": tell_shot_count,
    }
    return environment


def arm_colour(place: int) -> str:
    """Return the placeholder for the colour of the arm at `place` of the tables."""
    return f"#0b0c{place % NUM_ARM_COLOURS:02x}"


def _resolve_colour(match: re.Match[str]) -> str:
    colour = match[0]
    if colour in _VARIABLES:
        return _VARIABLES[colour]
    return f"var(--arm-{int(colour[5:], 16)})" if colour.startswith("#0b0c") else colour


@dataclass
class Plots:
    """The plots of one page. Inline styles become classes, so that the page's policy can forbid inline styles."""

    classes: dict[str, str] = field(default_factory=dict)
    """Style -> the name of its class."""
    count: int = 0
    """Plots so far; gives each plot's ids a prefix of their own."""

    def embed(self, figure: Figure, alt: str, *, kind: str = "plot") -> Markup:
        """Return the figure as an inline <svg> that gives `alt` to readers who do not see it."""
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        root = ElementTree.fromstring(file.getvalue())
        self.count += 1
        self._clean(root, f"p{self.count}-")
        root.attrib = {"viewBox": root.attrib["viewBox"], "class": kind, "role": "img", "aria-label": alt}
        return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree escaped it

    def embed_symbol(self, figure: Figure, name: str) -> Markup:
        """Return the figure as a <symbol> that the page draws at every <use href="#name">."""
        root = ElementTree.fromstring(str(self.embed(figure, "")))
        root.tag, root.attrib = "symbol", {"viewBox": root.attrib["viewBox"], "id": name}
        return Markup(ElementTree.tostring(root, encoding="unicode"))

    def style_sheet(self) -> str:
        """Return the CSS rules of all classes that the plots so far use."""
        return "\n".join(f".{name}{{{style}}}" for style, name in self.classes.items())

    def stand_alone(self, figure: Figure, alt: str) -> str:
        """Return the figure as a complete SVG file in the page's colours, light or dark."""
        svg = str(self.embed(figure, alt))
        colours = _ROOT.findall(read_part("page.css"))
        fonts = 'text{font-family:system-ui,"Noto Sans","Liberation Sans",sans-serif}'
        light, dark = (f"svg{{{rules.strip()}}}" for rules in colours[:2])
        style = f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n{fonts}\n{self.style_sheet()}"
        return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
            ">", f"><style>{style}</style>", 1
        )

    def _clean(self, element: ElementTree.Element, prefix: str) -> None:
        element.tag = element.tag.removeprefix(_SVG)
        for child in list(element):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                element.remove(child)
            else:
                self._clean(child, prefix)
        attributes = {}
        for key, value in element.attrib.items():
            if key == "style":
                attributes["class"] = self._class_of(value)
            elif key == _HREF:
                attributes["href"] = f"#{prefix}{value[1:]}"
            elif key == "id":
                if element.tag != "g":  # nothing refers to a group
                    attributes["id"] = prefix + value
            elif key == "clip-path":
                attributes[key] = value.replace("url(#", f"url(#{prefix}")
            elif not (key == "transform" and value.startswith("rotate(-0 ")):
                attributes[key] = _NUMBER.sub(lambda match: f"{float(match[0]):.1f}", " ".join(value.split()))
        element.attrib = attributes
        if element.tag != "text":
            element.text = None
        element.tail = None

    def _class_of(self, style: str) -> str:
        rules = [rule.strip() for rule in style.split(";") if not rule.strip().startswith("font-family")]
        resolved = re.sub(r"#[0-9a-f]{6}", _resolve_colour, ";".join(rules))
        return self.classes.setdefault(resolved, f"s{len(self.classes)}")
