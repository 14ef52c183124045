"""Report: a run on one page that opens anywhere: no script, no address, pictures inside."""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin-bottom: 1rem }
td, th { text-align: left; padding: .15rem 1.2rem .15rem 0 }
img { max-width: 100%; display: block } p.note { color: #666 }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A section with a PNG and a line that says what it shows."""

    title: str
    note: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Report:
    """What the page says.

    Attributes:
      title: of the page.
      metrics: {"train" | "validation" | "test": {name: value}}.
      summary: further facts by name: steps, time, where the best checkpoint is.
      pictures: in order.
      settings: {name: (value, default)} of those that differ from the defaults.
      environment: versions and devices by name.
    """

    title: str
    metrics: Mapping[str, Mapping[str, float]]
    summary: Mapping[str, str]
    pictures: Sequence[Picture]
    settings: Mapping[str, tuple[object, object]]
    environment: Mapping[str, str]


def write(report: Report, path: Path) -> None:
    """Writes the page, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(render(report), encoding="utf-8")
    partial.replace(path)


def render(report: Report) -> str:
    """The page as HTML."""
    names = list(dict.fromkeys(name for row in report.metrics.values() for name in row))
    numbers = [
        [kind, *(f"{values[name]:.4f}" if name in values else "" for name in names)]
        for kind, values in report.metrics.items()
    ]
    settings = [[name, str(value), str(default)] for name, (value, default)
                in report.settings.items()]  # fmt: skip
    sections = [
        f"<h1>{html.escape(report.title)}</h1>",
        _table(numbers, ["", *names]) if numbers else "",
        _table([[name, value] for name, value in report.summary.items()]),
        *map(_picture, report.pictures),
        "<h2>Settings that differ from the defaults</h2>",
        _table(settings, ["setting", "value", "default"]) if settings else "<p>none</p>",
        "<h2>Versions and devices</h2>",
        _table([[name, value] for name, value in report.environment.items()]),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(report.title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    lines = ["<table>"]
    if head:
        lines.append("<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>")
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    title = html.escape(picture.title)
    return (
        f'<h2>{title}</h2>\n<p class="note">{html.escape(picture.note)}</p>\n'
        f'<img alt="{title}" src="data:image/png;base64,{data}">'
    )
