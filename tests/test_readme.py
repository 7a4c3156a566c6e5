"""README.md: what it names exists, and the commands that it shows can be parsed."""

import ast
import re
import shlex

import pytest
from conftest import ROOT

import evaluate
import sample
import spectral
import train

MODULES = {f"{module.__name__}.py": module for module in (train, sample, evaluate, spectral)}
README = (ROOT / "README.md").read_text()
NAMES = re.findall(r"`(\w+\.py):(\w+)`", README)
COMMAND = r"^(?:python|torchrun [^\n]*?) ?(?:-- )?((?:train|sample|spectral|evaluate)\.py[^\n#&]*)"
COMMANDS = re.findall(COMMAND, README, re.M)


@pytest.mark.parametrize("file, name", NAMES)
def test_the_table_from_paper_to_code_is_true(file, name):
    tree = ast.parse((ROOT / file).read_text())
    defined = {getattr(node, "name", None) for node in tree.body}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [getattr(node, "target", None) or node.targets[0] for node in assigned]
    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert name in defined, f"README names {file}:{name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command):
    script, *arguments = shlex.split(command)
    MODULES[script].parse_arguments(arguments)


def test_table_and_commands_were_found():
    assert len(NAMES) >= 14 and len(COMMANDS) >= 7


def test_every_equation_table_and_figure_of_the_paper_has_a_row():
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    for kind, last in {"Eq.": 11, "Tab.": 10, "Fig.": 6}.items():
        named = set()
        for cell in (row.split("|")[1] for row in rows):
            for text in re.findall(re.escape(kind) + r" (\d+(?:(?:, | and | to )\d+)*)", cell):
                numbers = [int(n) for n in re.findall(r"\d+", text)]
                named |= set(range(numbers[0], numbers[-1] + 1)) if " to " in text else set(numbers)
        assert named >= set(range(1, last + 1)), f"{kind} {set(range(1, last + 1)) - named}"


def test_flags_that_the_tables_name_exist(capsys):
    named = re.findall(r"`(\w+\.py) (\w+ )?(--[^`]*)`", README)
    assert named
    for script, subcommand, flags in named:
        with pytest.raises(SystemExit):
            MODULES[script].parse_arguments([*subcommand.split(), "--help"])
        text = capsys.readouterr().out
        for flag in re.findall(r"--[\w-]+", flags):
            assert flag in text, f"{script} has no {flag}"


def test_pictures_are_there_and_small():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size < 300_000


def test_every_module_has_a_docstring_and_a_place_in_readme():
    for path in ROOT.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert path.name in README
