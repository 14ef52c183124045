"""The YAML that is written, as a reader that is not ours sees it."""

import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch.kubernetes import manifest

# No lone surrogates: what is to be written as UTF-8 cannot have them.
_strings = st.text(st.characters(exclude_categories=["Cs"]))
_words = st.sampled_from([
    "true", "No", "on", "null", "~", "y", ".inf", "1e3", "0x1f", "1_000", "1:30", "2001-01-01", "-",
    "?", ":", "#", "&", "*", "!", "|", ">", "%", "@", "`", "a:b", "a: b", "a #b", " a", "a ", "- a",
    "---", "...", "{}", "[]", "<<", "=", "'a'", '"a"', "a#b", "-a", "a-", "/a/b", "\\n",
])  # fmt: skip
_values = st.recursive(
    st.one_of(_strings, _words, st.booleans(), st.integers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(_strings, _words), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(st.text("abc", min_size=1), _values, min_size=1), min_size=1))
def test_what_is_read_is_what_was_written(documents):
    assert list(yaml.safe_load_all(manifest.text(documents, ["a note: {"]))) == documents


@given(_strings)
def test_a_scalar_is_on_one_line(value):
    text = manifest.text([{"a": value}])
    assert len(text.splitlines()) == 2


def test_text_is_easy_to_read():
    document = {
        "kind": "Job",
        "spec": {"count": 2, "on": True, "args": ["a", "--b=c"], "none": {}, "env": [{"x": "1"}]},
        "json": '{"it\'s": 1}',
    }
    assert manifest.text([document], ["first", ""]) == (
        """\
# first
#
---
kind: Job
spec:
  count: 2
  "on": true
  args:
    - a
    - "--b=c"
  none: {}
  env:
    - x: "1"
json: '{"it''s": 1}'
"""
    )
