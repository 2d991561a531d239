"""The pictures of the documentation are what the package's sizes draw now."""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def pictures():
    sys.path.insert(0, str(DOCS))
    try:
        import diagrams
    finally:
        sys.path.remove(str(DOCS))
    return {name: draw().svg() for name, draw in diagrams.PICTURES.items()}


def test_the_files_are_what_is_drawn(pictures):
    assert {path.name for path in (DOCS / "pictures").iterdir()} == set(pictures)
    for name, drawn in pictures.items():
        assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == drawn, "run python docs/diagrams.py"


def test_they_are_shown_and_say_in_words_what_they_show(pictures):
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    for name, drawn in pictures.items():
        assert re.search(rf"!\[[^]]{{40,}}\]\(pictures/{re.escape(name)}\)", pages), name
        assert ET.fromstring(drawn).find("{http://www.w3.org/2000/svg}title").text


def test_bytes_of_rows_are_those_of_the_table(pictures):
    """The table of docs/formats.md is compared with the package elsewhere."""
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    drawn = sorted(int(number.replace(",", "")) for number in re.findall(r">([\d,]+) bytes:", pictures["rows.svg"]))
    rows = re.findall(r"^\| (?:entries|indexer keys) \|(.*)\|$", page, re.MULTILINE)[:2]
    assert drawn == sorted(int(cell) for row in rows for cell in row.split("|") if cell.strip())
