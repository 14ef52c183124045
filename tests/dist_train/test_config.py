"""Settings: bounds, contradictions, flags."""

import dataclasses
import json

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train import Config, UsageError
from dist_train.options import define_flags, from_flags
from dist_train.settings import differences


def parsed(*arguments):
    values = flags.FlagValues()
    define_flags(values)
    values(["dist-train", *arguments])
    return from_flags(values)


def test_no_flags_are_the_defaults():
    assert parsed() == Config()


def test_flags_become_settings():
    config = parsed(
        "--strategy=multi-worker", "--batch_size=32", "--noshuffle", "--steps_per_loop=5",
        "--clip_norm=1", "--jit_compile=false",
    )  # fmt: skip
    assert config == Config(
        strategy="multi_worker", batch_size=32, shuffle=False, steps_per_loop=5, clip_norm=1.0,
        jit_compile="false",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"batch_size": "64"}, "is a str; use a int"),
        ({"batch_size": True}, "is a bool"),
        ({"learning_rate": float("nan")}, "not a finite number"),
        ({"ema": 1.5}, "above 1"),
        ({"strategy": "horovod"}, "not one of default, mirrored, multi_worker"),
        ({"devices": 2}, "use --strategy=mirrored"),
        ({"mode": "evaluate"}, "give --workdir"),
        ({"profile_steps": "20,10"}, "two rising steps"),
        ({"profile_steps": "x"}, "two rising steps"),
        ({"epochs": None}, "epochs is missing"),
        ({"seed": 2**31}, "above"),
        ({"clip_norm": 0.0}, "give a norm above 0"),
        ({"learning_rate": 10**400}, "not a finite number"),
        ({"stall_timeout_s": 1e9}, "stall_timeout_s=1000000000.0 is above 1000000"),
        ({"start_timeout_s": 1e9}, "start_timeout_s=1000000000.0 is above 1000000"),
        ({"profile_steps": "9" * 5000 + ",1"}, "two rising steps"),
    ],
)
def test_a_wrong_setting_is_refused_with_value_and_constraint(settings, message):
    with pytest.raises(UsageError, match=message):
        Config(**settings)


def test_steps_per_loop_is_auto_or_a_number():
    with pytest.raises(UsageError, match="neither auto nor a number"):
        parsed("--steps_per_loop=many")


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().batch_size = 3  # type: ignore[misc]


def test_what_may_differ_on_a_resume_is_not_the_trajectory():
    one = Config(strategy="mirrored", devices=2, log_steps=7, input="stream", epochs=9)
    assert one.trajectory() == Config().trajectory()
    assert one.trajectory() != Config(seed=1).trajectory()


def test_paths_may_differ_between_workers():
    assert Config(workdir="a", data_dir="b").shared() == Config().shared()
    assert Config(log_steps=3).shared() != Config().shared()


def test_differences_name_both_values():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == {"b": (2, 3), "c": (None, 4)}


_NAMES = [field.name for field in dataclasses.fields(Config)]
_TEXTS = st.text(max_size=6) | st.sampled_from(
    ["", "0", "1", "-1", "1e400", "nan", "inf", "true", "auto", "none", "9" * 400, "multi-worker"]
)
_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | _TEXTS
    | st.just([1])
    | st.just({})
)


def test_each_setting_has_a_flag_of_its_name_default_and_help():
    values = flags.FlagValues()
    define_flags(values)
    assert {name for name in values if not values[name].using_default_value} == set()
    for field in dataclasses.fields(Config):
        default = "auto" if field.name == "steps_per_loop" else field.default
        assert values[field.name].default == default
        assert values[field.name].help.endswith(field.metadata["help"])


@settings(max_examples=300)
@given(name=st.sampled_from(_NAMES), value=_VALUES)
def test_any_value_is_a_setting_of_its_type_or_an_error(name, value):
    try:
        config = Config(**{name: value})
    except UsageError as error:
        message = str(error)
    else:
        message = ""
        saved = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
        assert Config(**saved) == config
        assert not differences(saved, dataclasses.asdict(config))
    assert not message or name in message


@settings(max_examples=300)
@given(name=st.sampled_from(_NAMES), text=_TEXTS)
def test_any_text_of_a_flag_is_a_config_or_an_error(name, text):
    try:
        config = parsed(f"--{name}={text}")
    except (flags.Error, UsageError) as error:
        message = str(error)
    else:
        message = ""
        assert Config(**dataclasses.asdict(config)) == config
    assert not message or name in message


@pytest.mark.parametrize("name", ["batch_size", "learning_rate", "ema", "seed", "start_timeout_s"])
def test_bounds_hold_for_flags_and_settings_alike(name):
    meta = {field.name: field.metadata for field in dataclasses.fields(Config)}[name]
    for bound, beyond in ((meta["lower"], -1), (meta["upper"], 1)):
        if bound is None:
            continue
        assert getattr(parsed(f"--{name}={bound}"), name) == bound
        with pytest.raises(flags.IllegalFlagValueError):
            parsed(f"--{name}={bound + beyond}")
        with pytest.raises(UsageError):
            Config(**{name: bound + beyond})


def test_a_schedule_that_ends_with_the_run_makes_its_length_part_of_the_trajectory():
    assert Config(epochs=3).trajectory() == Config(epochs=4).trajectory()
    cosine = [Config(lr_schedule="cosine", epochs=epochs).trajectory() for epochs in (3, 4)]
    assert cosine[0] != cosine[1]


def test_optimizer_args_are_numbers_words_and_truth_values():
    text = "momentum=0.9, nesterov=True,name=a,steps=3,epsilon=1e-7"
    options = Config(optimizer_args=text).optimizer_options
    expected = {"momentum": 0.9, "nesterov": True, "name": "a", "steps": 3, "epsilon": 1e-7}
    assert options == expected
    assert [type(value) for value in options.values()] == [float, bool, str, int, float]
    assert Config().optimizer_options == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("momentum", "optimizer_args: 'momentum' is not of the form name=value"),
        ("momentum=", "not of the form"),
        ("a b=1", "'a b=1' is not of the form"),
        ("momentum=1,momentum=2", "momentum is given twice"),
    ],
)
def test_optimizer_args_of_another_form_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        Config(optimizer_args=text)


def test_the_rate_is_linear_in_the_batch_where_a_reference_is_given():
    assert Config(learning_rate=0.1, batch_size=64).scaled_rate == 0.1
    assert Config(learning_rate=0.1, batch_size=64, scale_lr=256).scaled_rate == 0.025
    assert Config(learning_rate=0.1, batch_size=1024, scale_lr=256).scaled_rate == 0.4


def test_early_stopping_without_validations_is_refused():
    with pytest.raises(UsageError, match=r"early_stopping=2 .*use --eval_epochs=1"):
        Config(early_stopping=2, eval_epochs=0)
