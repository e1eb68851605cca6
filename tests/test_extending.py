"""A stranger adds a codec, a detector, a data set, a weights reader and a task on other data.

Each lies in tests/strangers/ in at most 60 lines and uses the package as it is installed.
"""

import pathlib

import pytest

STRANGERS = sorted(pathlib.Path(__file__).with_name("strangers").glob("*.py"))


@pytest.mark.parametrize("path", STRANGERS, ids=lambda path: path.stem)
def test_a_stranger_needs_at_most_sixty_lines(path):
    assert len(path.read_text().splitlines()) <= 60
