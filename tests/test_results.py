"""Each measured section of README.md and docs/benchmarks.md says what the benchmarks' files say, and no other."""

import re

import pytest

from benchmarks.render import SECTIONS, fill_section, load_results


@pytest.mark.parametrize(
    ("file", "name"),
    [pytest.param(file, name, id=f"{file.stem}: {name}") for file, sections in SECTIONS.items() for name in sections],
)
def test_a_section_is_what_the_renderer_would_write(file, name):
    page = file.read_text()
    assert fill_section(page, name, SECTIONS[file][name](load_results())) == page


@pytest.mark.parametrize("file", SECTIONS, ids=lambda file: file.stem)
def test_a_page_has_no_other_sections(file):
    assert re.findall("<!-- end of (.+) -->", file.read_text()) == list(SECTIONS[file])
