"""Arguments: 'name=value,name=value' on a command line, and what the values mean."""

from dist_train.errors import UsageError

Value = bool | int | float | str


def parse(setting: str, text: str) -> dict[str, Value]:
    """{name: value} of 'momentum=0.9,nesterov=true'.

    A value is true or false (in any capitals), else an integer, else a number, else text.

    Args:
      setting: the name of the setting that holds `text`, for the error.

    Raises:
      UsageError: a part is not of this form, or a name comes twice.
    """
    found: dict[str, Value] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise UsageError(f"{setting}: {part!r} is not of the form name=value")
        if name in found:
            raise UsageError(f"{setting}: {name} is given twice; give it once")
        found[name] = _value(value)
    return found


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
