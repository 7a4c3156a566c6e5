"""README.md and docs/*.md: what they name exists, the commands that they show can be parsed."""

import ast
import re
import shlex

import pytest
import torch
from conftest import ROOT

import evaluate
import sample
import spectral
import train
from common import runs

MODULES = {f"{module.__name__}.py": module for module in (train, sample, evaluate, spectral)}
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
README = PAGES[ROOT / "README.md"]
COMMAND = r"^(?:python|torchrun [^\n]*?) ?(?:-- )?((?:train|sample|spectral|evaluate)\.py[^\n#&]*)"


def defined(file: str) -> set[str]:
    """The names that a file defines at its top level."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = getattr(node, "targets", None) or [node.target]
            found |= {
                name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)
            }
        found.add(getattr(node, "name", None))
    return found


def test_the_table_from_paper_to_code_is_true():
    names = re.findall(r"`([\w/]+\.py):(\w+)`", "".join(PAGES.values()))
    assert len(names) >= 14
    files = {file: defined(file) for file, _ in names}
    assert not [f"{file}:{name}" for file, name in names if name not in files[file]]


def test_the_commands_parse():
    commands = re.findall(COMMAND, "\n".join(PAGES.values()), re.M)
    assert len(commands) >= 7
    for script, *arguments in map(shlex.split, commands):
        MODULES[script].parse_arguments(arguments)


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
    named = re.findall(r"`(\w+\.py) (\w+ )?(--[^`]*)`", "".join(PAGES.values()))
    assert named
    for script, subcommand, flags in named:
        with pytest.raises(SystemExit):
            MODULES[script].parse_arguments([*subcommand.split(), "--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[\w-]+", flags)) <= known, f"{script} {flags}"


def test_pictures_are_there_and_small_and_every_file_has_its_place():
    for page, text in PAGES.items():
        for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (page.parent / path).stat().st_size < 300_000
    for path in ROOT.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert path.name in README


def test_links_lead_to_a_file_and_to_a_heading_of_it():
    found = []
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)(.*?)\)", text):
            path, _, heading = target.partition("#")
            found.append(path)
            linked = page.parent / path
            assert linked.is_file(), target
            # GitHub's name of a heading: small letters, spaces to hyphens, punctuation dropped.
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if heading else []
            titles = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in titles, target
    assert len(found) >= 10


@pytest.mark.parametrize("name", ["shapes", "emigm", "captions"])
def test_a_checkpoint_that_comes_with_the_code_is_the_one_that_readme_names(name):
    path = runs.SHIPPED.with_name(f"{name}.pt")
    assert path.stat().st_size < 3_000_000 and runs.file_sha256(path) in README
    model = train.load_checkpoint(path)
    c = train.preset_config("captions" if name == "captions" else "shapes")
    found = (model.config.preset, model.config.prior, model.step, model.config.caption_words)
    assert found == (c.preset, "emigm" if name == "emigm" else "flow", c.steps, c.caption_words)
    assert len(model.class_names) == (21 if name == "captions" else 10)
    assert all(p.dtype == torch.float32 for p in model.parameters())
