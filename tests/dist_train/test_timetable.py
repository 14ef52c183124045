"""When a run logs, validates and saves."""

from dist_train.timetable import Timetable

PLAN = {"steps_per_epoch": 10, "total_steps": 30, "log_steps": 4}


def steps_of(due, total=30):
    return [step for step in range(1, total + 1) if due(step)]


def test_a_line_comes_every_few_steps_and_at_the_end():
    assert steps_of(Timetable(**PLAN).logs) == [4, 8, 12, 16, 20, 24, 28, 30]


def test_a_validation_comes_every_few_epochs_or_never():
    assert steps_of(Timetable(**PLAN, eval_epochs=1).validates) == [10, 20, 30]
    assert steps_of(Timetable(**PLAN, eval_epochs=2).validates) == [20]
    assert steps_of(Timetable(**PLAN, eval_epochs=0).validates) == []


def test_a_checkpoint_comes_at_the_end_of_each_epoch_or_as_asked_for():
    assert steps_of(lambda step: Timetable(**PLAN).saves(step, 0.0)) == [10, 20, 30]
    often = Timetable(**PLAN, checkpoint_steps=7)
    assert steps_of(lambda step: often.saves(step, 0.0)) == [7, 14, 21, 28, 30]
    timed = Timetable(**PLAN, checkpoint_secs=5.0)
    assert not timed.saves(3, 4.9)
    assert timed.saves(3, 5.0)
    assert timed.saves(10, 0.0)


def test_nothing_that_is_due_is_passed_over():
    plan = Timetable(**PLAN, eval_epochs=1, checkpoint_steps=7)
    step, reached = 0, []
    while step < 30:
        step += plan.steps_to_next(step)
        reached.append(step)
    assert reached == [7, 10, 14, 20, 21, 28, 30]
    assert reached == [s for s in range(1, 31) if plan.validates(s) or plan.saves(s, 0.0)]


def test_the_next_line_is_known_from_any_step():
    plan = Timetable(**PLAN)
    assert [step + plan.steps_to_line(step) for step in range(9)] == [4, 4, 4, 4, 8, 8, 8, 8, 12]
