"""The house keeps its plan: who imports whom, how long things are, what the word draw means."""

import ast
import re

import pytest
from conftest import ROOT

BUDGETS = {  # file -> its most lines, and the files of this level that it may import
    "encoder": (240, ""),
    "flow": (480, ""),
    "decoder": (140, "encoder"),
    "losses": (430, "encoder"),
    "emigm": (350, "encoder"),
    "train": (930, "encoder flow decoder losses emigm"),
    "sample": (400, "train emigm flow"),
    "spectral": (450, "train"),
    "evaluate": (900, "train sample losses flow"),
}
COMMON_LINES = 2057  # the plan said 1450, before what hostile input, captions and data sets need
PLUMBING = {"zipfile", "signal", "fcntl", "urllib"}  # of common/ only
FUNCTION_LINES, LONGER = 80, {"train.main": 130}
TOP = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
COMMON = {path.stem: path.read_text() for path in (ROOT / "common").glob("*.py")}


def imported(source: str) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def functions(source: str) -> list[tuple[str, ast.FunctionDef]]:
    """All functions of a file; a method is Class.name."""
    tree, found = ast.parse(source), []
    owners = {
        id(f): c.name + "." for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.append((owners.get(id(node), "") + node.name, node))
    return found


def explained(source: str) -> set[int]:
    """The lines that are a comment or in a docstring."""
    lines = {i for i, line in enumerate(source.splitlines(), 1) if line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_every_file_of_the_top_level_has_a_plan():
    assert TOP.keys() == BUDGETS.keys()


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_of_the_top_level_keeps_to_its_plan(name):
    source, (most, allowed) = TOP[name], BUDGETS[name]
    count, packages, wrong = source.count("\n"), imported(source), []
    if count > most:
        wrong.append(f"{count} lines of {most}")
    if others := packages & TOP.keys() - set(allowed.split()):
        wrong.append(f"imports {others}")
    if plumbing := packages & PLUMBING:
        wrong.append(f"imports {plumbing}: that is for common/")
    if not 0.20 <= (share := len(explained(source)) / count) <= 0.40:
        wrong.append(f"{share:.1%} of its lines explain")
    assert not wrong


def test_common_knows_neither_the_top_level_nor_the_paper():
    wrong, count = [], sum(source.count("\n") for source in COMMON.values())
    if count > COMMON_LINES:
        wrong.append(f"{count} lines of {COMMON_LINES}")
    for name, source in COMMON.items():
        wrong += [f"{name} imports {other}" for other in imported(source) & TOP.keys()]
        cited = re.findall(r"\b(?:Eq|Sec|Tab|Fig|App)\. \w+", source)
        wrong += [f"{name} cites {place}" for place in cited]
    assert not wrong


@pytest.mark.parametrize("name", [*TOP, *COMMON])
def test_functions_are_short_and_draw_means_random_numbers(name):
    source = (TOP | COMMON)[name]
    for function, node in functions(source):
        where = f"{name}.{function}"
        count, most = node.end_lineno - node.lineno + 1, LONGER.get(where, FUNCTION_LINES)
        assert count <= most, f"{where} has {count} lines"
        if "draw" in function.lower().split(".")[-1]:
            text = ast.unparse(node)
            assert re.search("generator|rand|seed", text), f"{where} draws no random numbers"
