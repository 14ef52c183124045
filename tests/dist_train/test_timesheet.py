import pytest

from dist_train.timesheet import Timesheet


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_shares_are_of_the_time_since_they_were_taken_last():
    clock = Clock()
    sheet = Timesheet(("input", "saving"), clock)
    for _ in range(2):
        clock.now += 4
        with sheet.on("input"):
            clock.now += 1
    assert sheet.take() == {"input": 0.2, "saving": 0.0, "compute": 0.8}
    clock.now += 1
    with pytest.raises(OSError), sheet.on("saving"):  # noqa: PT011, PT012
        clock.now += 3
        raise OSError
    assert sheet.take() == {"input": 0.0, "saving": 0.75, "compute": 0.25}


def test_time_that_was_estimated_never_makes_more_than_the_whole():
    clock = Clock()
    sheet = Timesheet(("communication",), clock)
    clock.now += 4
    sheet.add("communication", 1.0)
    assert sheet.take() == {"communication": 0.25, "compute": 0.75}
    clock.now += 4
    sheet.add("communication", 5.0)
    assert sheet.take() == {"communication": 1.0, "compute": 0.0}


def test_no_time_at_all_is_no_error():
    sheet = Timesheet(("input",), Clock())
    assert sheet.take() == {"input": 0.0, "compute": 1.0}
