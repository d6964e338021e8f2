"""The catalogue of faults names tests that there are, every fault once, and every file of this folder."""

import ast
from pathlib import Path

import yaml

TESTS = Path(__file__).parents[1]
CATALOGUE = TESTS / "faults" / "catalogue.yaml"


def faults():
    """(fault, test) of every line; read as pairs, since a mapping would hide a fault that stands twice."""
    groups = yaml.compose(CATALOGUE.read_text(encoding="utf-8")).value
    return [(fault.value, test.value) for _, group in groups for fault, test in group.value]


def functions_of(path):
    """Names of the tests in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_exists():
    lost = []
    for fault, test in faults():
        file, function = test.split("::")
        path = TESTS / file
        if not path.is_file() or function not in functions_of(path):
            lost.append(f"{fault}: {test}")
    assert not lost


def test_no_fault_stands_twice():
    named = [fault for fault, _ in faults()]
    assert sorted(named) == sorted(set(named))


def test_every_file_of_this_folder_is_named():
    files = {path.name for path in CATALOGUE.parent.glob("test_*.py")} - {Path(__file__).name}
    assert files == {Path(test.split("::")[0]).name for _, test in faults() if test.startswith("faults/")}
