"""The README shows commands that parse, snippets that compile, and files that are there."""

import ast
import inspect
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

import dist_train
from dist_train import options
from launch import __main__ as launcher

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = _FENCED.sub("", README)
INDENTED = re.findall(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+", PROSE)
SNIPPETS = [text for language, text in _FENCED.findall(README) if language == "python"]
SPANS = re.findall(r"`([^`\n]+)`", PROSE)


def commands(name):
    """{line: the arguments of the `name …` in it}, without what a pipeline has around it."""
    others = [text for language, text in _FENCED.findall(README) if language != "python"]
    lines = [line for text in (*INDENTED, *others) for line in text.splitlines()]
    found = {}
    for line in [*lines, *SPANS]:
        if not re.search(rf"\b{name}\b", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for operator, words in itertools.groupby(lexer, lambda word: set(word) <= set("|&;<>()")):
            words = list(words)
            at = [Path(word).name for word in words]
            if not operator and name in at[:-1]:
                found[line] = words[at.index(name) + 1 :]
    assert found, f"no {name} is shown"
    return [pytest.param(arguments, id=line) for line, arguments in found.items()]


def test_the_map_of_the_package_names_each_module():
    folder = ROOT / "dist_train"
    modules = {path.stem for path in folder.glob("[!_.]*") if path.suffix in ("", ".py")}
    assert dist_train.__doc__ is not None
    assert modules - set(re.findall(r"\w+", dist_train.__doc__)) == set()


@pytest.mark.parametrize("arguments", commands("dist-train"))
def test_a_command_of_the_trainer_parses(arguments):
    # A file of flags need not be there, and absl answers --help with an exit.
    arguments = [each for each in arguments if not re.match("--(flagfile|help)", each)]
    values = flags.FlagValues()
    options.define_flags(values)
    words = values(["dist-train", *arguments])
    if values.compare is None:
        options.from_flags(values, words[1:])


@pytest.mark.parametrize("arguments", commands("dist-launch"))
def test_a_command_of_the_launcher_gives_a_plan(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "launch", "--dry_run", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_flag_that_is_named_exists():
    ours = flags.FlagValues()
    options.define_flags(ours)
    known = {*ours, *launcher.options.FLAGS, "help", "helpfull", "flagfile", "v"}
    # Flags with a hyphen are those of srun, pip and the like.
    named = {name for span in SPANS for name in re.findall(r"(?<!\S)--(\w+)(?![\w-])", span)}
    assert len(named) > 60
    assert {
        name for name in named if name not in known and name.removeprefix("no") not in known
    } == set()


def test_every_flag_of_the_launcher_is_named():
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", README, re.MULTILINE))
    named = set(re.findall(r"--(\w+)", sections["Launching"] + sections["dist-launch"]))
    assert set(launcher.options.FLAGS) - named == {"help"}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_a_snippet_compiles_and_names_what_exists(snippet):
    tree = ast.parse(snippet)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dist_train":
            assert hasattr(dist_train, node.attr), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("dist_train."):
            called = getattr(dist_train, node.func.attr)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            inspect.signature(called).bind(*node.args, **keywords)
            if called is dist_train.Config:
                called(**{name: ast.literal_eval(value) for name, value in keywords.items()})


def test_all_python_is_among_the_snippets():
    assert len(SNIPPETS) >= 3
    assert not [text for text in INDENTED if re.search(r"\bdist_train\.\w+\(|^ *import ", text)]


def test_every_link_leads_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    }
    targets = re.findall(r"\]\(([^)]+)\)", PROSE)
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists() or path.startswith("https://"), target
        assert not anchor or anchor in anchors, target
    for path in (
        span for span in SPANS if re.match(r"(tests|dist_train|launch|\.ci)/[^ ]*$", span)
    ):
        assert list(ROOT.glob(path)), path
