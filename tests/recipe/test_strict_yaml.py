"""YAML as a person reads it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakd_cli.recipe import strict_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5e4", 5e4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5E+3", -2500.0),
        ("3", 3),
        ("1_000", 1000),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("True", "True"),
        ("010", "010"),
        ("12:30:45", "12:30:45"),
        ("2024-01-02", "2024-01-02"),
        ("0x10", "0x10"),
        ("'1e-3'", "1e-3"),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars(text, value):
    document = strict_yaml.parse(text)

    assert document.problems == []
    assert document.value == value
    assert type(document.value) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: given twice, first on line 1"),
        ("x:\n  - {k: 1, k: 2}\n", 2, "x.0.k: given twice, first on line 2"),
        ("a: &n 1\nb: *n\n", 1, "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "tag"),
        ("a: !!binary abc=\n", 1, "tag"),
        ("a: [1\nb: 2\n", 2, "expected"),
        ("a: 1\n---\nb: 2\n", 2, "but found another document"),
        ("? [a]\n: 1\n", 1, "a key must be a word"),
        ("a: 1\n\tb: 2\n", 2, "cannot start any token"),
        ("a: \x00\n", 1, "not readable"),
    ],
)
def test_what_is_refused(text, line, message):
    problems = strict_yaml.parse(text).problems

    assert problems
    assert problems[0][0] == line
    assert message in problems[0][1]


def test_lines_of_every_path():
    document = strict_yaml.parse("# note\na:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n")

    assert document.lines[("a", "b")] == 3
    assert document.lines[("a", "c", 1, "d")] == 6


# No file is named with NUL, and PyYAML 6.0.3 folds the next-line character into a space when it writes it.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x85\0"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts.filter(bool), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), values, max_size=4))
def test_what_is_dumped_is_read_back(value):
    document = strict_yaml.parse(strict_yaml.dump(value))

    assert document.problems == []
    assert (document.value or {}) == value
