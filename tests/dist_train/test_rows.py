import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.rows import MetricsFile, read_rows

_FUZZ = settings(max_examples=150)


def _row(step, kind="train", **more):
    return {"kind": kind, "step": step, "loss": 0.5} | more


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_rows_are_read_as_they_were_written(path):
    file = MetricsFile(path, resumed_step=0)
    rows = [_row(1), _row(1, "validation", accuracy=0.1), _row(2, "test")]
    for number, row in enumerate(rows):
        file.write(row)
        assert read_rows(path) == rows[: number + 1]  # at once, without a close
    file.sync()
    file.close()


def test_no_file_has_no_rows(path):
    assert read_rows(path) == []


def test_a_resume_forgets_what_will_be_done_again(path):
    rows = [_row(1), _row(2), _row(2, "validation"), _row(2, "test"), _row(3), _row(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = MetricsFile(path, resumed_step=2)
    file.write(_row(3, loss=0.25))
    file.close()
    assert read_rows(path) == [_row(1), _row(2), _row(2, "validation"), _row(3, loss=0.25)]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_last_line_is_passed_over(path, cut):
    whole = json.dumps(_row(1)) + "\n"
    torn = json.dumps(_row(2))
    path.write_text(whole + torn[:-cut])
    assert read_rows(path) == [_row(1)]
    file = MetricsFile(path, resumed_step=1)
    file.write(_row(2))
    file.close()
    assert read_rows(path) == [_row(1), _row(2)]
    assert path.read_text() == whole + torn + "\n"


_ODD = st.sampled_from(
    [
        b"",
        b"null",
        b"[1]",
        b"\xff\xfe",
        b"9" * 5000,
        b"[" * 100_000,
        b'{"kind": "train"}',
        b'{"step": 1}',
        b'{"kind": "train", "step": "1"}',
        b'{"kind": "train", "step": true}',
        b'{"kind": "train", "step": 1.5}',
        b'{"kind": "train", "step": null}',
    ]
) | st.binary(max_size=30).filter(lambda line: b"{" not in line)


@_FUZZ
@given(lines=st.lists(st.integers(0, 9) | _ODD, max_size=8), end=st.integers(0, 20))
def test_odd_lines_are_passed_over(path, lines, end):
    encoded = [json.dumps(_row(line)).encode() if isinstance(line, int) else line for line in lines]
    torn = json.dumps(_row(3)).encode()[:end]
    path.write_bytes(b"\n".join([*encoded, torn]))
    rows = [_row(line) for line in lines if isinstance(line, int)]
    assert read_rows(path) == rows
    MetricsFile(path, resumed_step=4).close()
    assert read_rows(path) == [row for row in rows if row["step"] <= 4]
