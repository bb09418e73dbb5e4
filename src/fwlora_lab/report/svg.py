"""SVG that is put into a page: only drawing is kept, and its ids are made unique."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_ELEMENTS = set(
    "svg g defs path use clipPath rect circle ellipse line polyline polygon text tspan title desc image "
    "linearGradient radialGradient stop".split()
)
_ATTRIBUTES = set(
    "id d x y x1 y1 x2 y2 cx cy r rx ry width height viewBox transform style class points fill stroke opacity "
    "fill-opacity stroke-opacity stroke-width stroke-dasharray stroke-linecap stroke-linejoin clip-path clip-rule "
    "fill-rule offset stop-color stop-opacity gradientTransform gradientUnits preserveAspectRatio text-anchor "
    "font-size font-family font-weight clipPathUnits".split()
)


def foreign(svg: str) -> str | None:
    """What `only_drawing` leaves of an SVG file that was not drawn here; None if it is not SVG."""
    try:
        return only_drawing(svg)
    except (ElementTree.ParseError, ValueError):
        return None


def with_ids(svg: str, prefix: str) -> str:
    """The SVG with `prefix` before all ids and references, so that no figure uses the clip paths of another one."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg)


def only_drawing(svg: str) -> str:
    """The drawing of an SVG document, without its prolog, style sheets, scripts, links, fonts and fixed size.

    Raises:
        ValueError: the document is not SVG.
        ElementTree.ParseError: it is not XML.
    """
    root = ElementTree.fromstring(svg)
    if root.tag != f"{_SVG}svg":
        raise ValueError("the document is not SVG")
    _clean(root)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    # Matplotlib writes this in a style sheet, which would apply to the whole page.
    root.set("style", "stroke-linejoin:round;stroke-linecap:butt")
    for key in ("width", "height", "class", "id"):
        root.attrib.pop(key, None)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(node: ElementTree.Element) -> None:
    """Remove everything from a node and its children that is not in the two lists, or that refers outside the page."""
    node.tag = node.tag.removeprefix(_SVG)
    href = node.attrib.pop(_HREF, None) or node.attrib.pop("href", None)
    for key, value in list(node.attrib.items()):
        outside = re.search(r"url\(\s*['\"]?(?!#)|@import|expression|javascript:|\\", value, re.IGNORECASE)
        if key not in _ATTRIBUTES or (outside and key != "d"):
            del node.attrib[key]
    if href is not None and href.startswith(("#", "data:image/png;base64,")):
        node.set("href", href)
    if "style" in node.attrib:
        node.set("style", re.sub(r"font: (?:[a-z0-9]+ )*?([\d.]+px)[^;]*", r"font-size: \1", node.attrib["style"]))
        node.set("style", re.sub(r"font-family: [^;]*;? ?", "", node.attrib["style"]))
    if node.tag not in ("text", "tspan", "title", "desc"):
        node.text = None
    node.tail = None
    for child in list(node):
        if isinstance(child.tag, str) and child.tag.removeprefix(_SVG) in _ELEMENTS:
            _clean(child)
        else:
            node.remove(child)
