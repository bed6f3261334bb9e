"""Pascal VOC's XML: read by its declared encoding and without entities, and written."""

from __future__ import annotations

import re
from decimal import Context, Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from tailfin.errors import UserError
from tailfin.files import decode_text, not_utf8

_EXACT = Context(prec=700)  # digits: the sum of any two floats of at most 1e9 fits


FLAGS = ("difficult", "truncated", "occluded")


_ENCODING = re.compile(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"']")


_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def plain_number(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else float(value)


def parse_xml(path: Path) -> tuple[ElementTree.Element, list[int]]:
    """The tree, and the line of each `object`; a document type, which is where entities come from, is refused."""
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate("utf-8")  # whatever the file declares: it is decoded before
    parser.buffer_text = True
    lines: list[int] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "object":
            lines.append(parser.CurrentLineNumber)
        builder.start(tag, attributes)

    def refuse(*_: Any) -> None:
        raise UserError(f"{path}, line {parser.CurrentLineNumber}: it declares a document type, which is refused")

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(_decoded(path), True)
    except expat.ExpatError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid XML: {expat.ErrorString(error.code)}") from None
    return builder.close(), lines


def _decoded(path: Path) -> bytes:
    """The file as UTF-8: by its byte order mark, by the encoding that it declares, else UTF-8."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:3] == b"\xef\xbb\xbf":
        return decode_text(data, str(path)).encode()
    declared = _ENCODING.match(data)
    name = declared[1].decode("ascii") if declared else "utf-8"
    try:
        return data.decode(name).encode()
    except LookupError:
        raise UserError(f'{path} declares the encoding "{name}", which is not known: save it as UTF-8') from None
    except UnicodeDecodeError as error:
        if not declared:
            raise UserError(not_utf8(data, str(path))) from None
        raise UserError(
            f"{path} declares the encoding {name}, which byte {error.start} (0x{data[error.start]:02x}) does not fit: "
            "save it as UTF-8"
        ) from None
    except UnicodeError as error:
        raise UserError(f"{path} cannot be read in the encoding {name}: {error}") from None


def to_xml(image: dict[str, Any], picture: str, annotations: list[dict[str, Any]], name_of: dict[int, str]) -> bytes:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, text: object = None) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag)
        if text is not None:
            element.text = str(text)
        return element

    add(root, "folder", "JPEGImages")
    add(root, "filename", xml_text(picture, f"image {image['id']}"))
    size = add(root, "size")
    for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
        add(size, key, value)
    add(root, "segmented", 0)
    for annotation in annotations:
        entry = add(root, "object")
        add(entry, "name", name_of[annotation["category_id"]])
        add(entry, "pose", xml_text(str(annotation.get("pose", "Unspecified")), f"annotation {annotation['id']}"))
        for flag in FLAGS:
            if flag != "occluded" or flag in annotation:
                add(entry, flag, int(bool(annotation.get(flag, 0))))
        x, y, width, height = (Decimal(repr(value)) for value in annotation["bbox"])
        box = add(entry, "bndbox")
        for key, first, second in (("xmin", x, 1), ("ymin", y, 1), ("xmax", x, width), ("ymax", y, height)):
            add(box, key, f"{_EXACT.add(first, Decimal(second)):f}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def xml_text(text: str, what: str) -> str:
    if _NO_XML.search(text) or "\n" in text or text != text.strip() or not text:
        raise UserError(f"{what}: {text!r} cannot be written to XML")
    return text
