"""The house rules of imports, files and docstrings, walked over the sources.

What may import what is the table of the design: a module sees its own package and the layers below it. Libraries that
the design keeps in few places are listed with those places. Imports inside functions count like any others.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import osm_lightning

PACKAGE = "osm_lightning"
SOURCES = Path(osm_lightning.__file__).parent

LAYERS = (
    {"idle_hints", "picture", "rank_label", "rle", "whole_file"},
    {"batch", "datasets", "vocabulary", "instructions", "record", "shard_index", "shard_transport"},
    {"shard_folder", "shard_tar"},
    {"shards", "data", "model"},
    {"naming", "weights", "evaluation"},
    {"training"},
    {"api", "checkpoint_words", "cli", "commands", "expectation"}
    | {"missing_parts", "model_settings", "__main__", "__init__"},
)
"""Lowest first. Members of one layer are strangers to each other, but for the last one, which puts all together."""

NEVER = {"evaluation": {"model"}}
"""Lower layers that a member must not import all the same."""

LIBRARY_PLACES = {
    "lightning": ("cli", "data.module", "training"),
    "open_clip": ("model.towers", "weights"),
    "transformers": (
        "model.towers",
        "model.language",
        "model.instructblip",
        "model.pretrained",
        "model.quantized",
        "data.text",
        "weights",
        "evaluation.similarity",
    ),
    "webdataset": ("shards", "data"),
}
"""Where a library may be imported: modules, or packages with all that is in them."""

ALIASES = {"pytorch_lightning": "lightning", "lightning_fabric": "lightning"}
VAGUE_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}

LAYER_OF = {member: number for number, members in enumerate(LAYERS) for member in members}


def module_name(path: Path, root: Path) -> str:
    """`data.text` for data/text.py, `data` for data/__init__.py, `__init__` for the package's own."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, `from x import y` as x.y."""
    package = (PACKAGE, *path.relative_to(root).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def complaint_about(module: str, imported: str, root: Path) -> str | None:
    """What is wrong with one import, or None."""
    library, *rest = imported.split(".")
    member = module.split(".")[0]
    if library != PACKAGE:
        library = ALIASES.get(library, library)
        places = LIBRARY_PLACES.get(library, (module,))
        if any(module == place or module.startswith(f"{place}.") for place in places):
            return None
        return f"{library} may be imported in {', '.join(places)} only"
    target = rest[0] if rest else "__init__"
    if not (root / target).is_dir() and not (root / f"{target}.py").is_file():
        target = "__init__"  # a name of the package itself
    if target == member:
        return None
    if target in NEVER.get(member, ()):
        return f"{member} never imports {target}"
    own, other = LAYER_OF.get(member), LAYER_OF.get(target)
    if own is None or other is None:
        return None  # said once, of the file
    if other > own:
        return f"imports go down only, and {target} lies above {member}"
    if other == own < len(LAYERS) - 1:
        return f"{member} and {target} lie in one layer and must not know each other"
    return None


def violations(root: Path) -> list[str]:
    """Every broken rule under a package folder, one readable line each."""
    found = []
    for path in sorted(root.rglob("*.py")):
        where, module = path.relative_to(root).as_posix(), module_name(path, root)
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        found += [
            f"{where}: {part!r} says nothing; name it after what it holds"
            for part in path.relative_to(root).with_suffix("").parts
            if part.lower().strip("_") in VAGUE_NAMES
        ]
        if module.split(".")[0] not in LAYER_OF:
            found.append(f"{where}: {module.split('.')[0]!r} is in no layer; add it to LAYERS")
        if ast.get_docstring(tree) is None and (path.name != "__init__.py" or text.strip()):
            found.append(f"{where}: the module has no docstring")
        for line, imported in imports_of(tree, path, root):
            complaint = complaint_about(module, imported, root)
            if complaint is not None:
                found.append(f"{where}:{line}: imports {imported}, but {complaint}")
    return found


def test_the_sources_keep_the_rules() -> None:
    assert len(list(SOURCES.rglob("*.py"))) > 10, "the sources were not found"
    found = violations(SOURCES)
    assert not found, "\n" + "\n".join(found)


def test_command_line_starts_without_torch() -> None:
    """Importing torch takes seconds: `osm --help` and the offline commands' `--help` must not wait for it."""
    program = """
import importlib, pkgutil, sys
import osm_lightning.commands
names = ["osm_lightning.__main__"]
names += [f"osm_lightning.commands.{module.name}" for module in pkgutil.iter_modules(osm_lightning.commands.__path__)]
for name in names:
    importlib.import_module(name)
    heavy = sorted({"torch", "transformers", "lightning"} & set(sys.modules))
    if heavy:
        sys.exit(f"importing {name} imports {', '.join(heavy)}")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


# The checker itself


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small tree that keeps every rule."""
    for path, text in {
        "__init__.py": "",
        "batch.py": '"""Contract."""\nimport torch\n',
        "record.py": '"""Contract."""\n',
        "data/__init__.py": "",
        "data/text.py": '"""Text."""\nfrom transformers import AutoTokenizer\nfrom osm_lightning.batch import X\n',
        "data/module.py": '"""Module."""\nimport lightning as L\nfrom . import text\nfrom .text import encode\n',
        "data/parts/collate.py": '"""Collate."""\nfrom ..text import encode\nfrom ... import batch\n',
        "model/vision.py": '"""Vision."""\nfrom osm_lightning.model.towers import of_open_clip\n',
        "model/towers/of_open_clip.py": '"""Vision."""\ndef build():\n    import open_clip\n',
        "weights/deep/names.py": '"""Names."""\nimport transformers.models\nimport osm_lightning.model.vision\n',
        "training/task.py": '"""Task."""\nimport lightning.pytorch\nfrom osm_lightning import data, model\n',
        "evaluation/naming.py": '"""Naming."""\nfrom osm_lightning import batch\n',
        "api.py": '"""API."""\nfrom osm_lightning import __version__, cli, training\n',
        "cli.py": '"""CLI."""\nfrom osm_lightning.commands import shards\n',
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_checker_accepts_what_keeps_the_rules(house: Path) -> None:
    assert violations(house) == []


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("batch.py", "import osm_lightning.data.text", "imports go down only, and data lies above batch"),
        ("batch.py", "from osm_lightning import record", "batch and record lie in one layer"),
        ("batch.py", "from osm_lightning import OSM", "__init__ lies above batch"),
        ("model/vision.py", "from osm_lightning.data import text", "model and data lie in one layer"),
        ("model/vision.py", "from ..data.text import encode", "model and data lie in one layer"),
        ("model/vision.py", "from .. import data", "model and data lie in one layer"),
        ("model/vision.py", "def late():\n    from osm_lightning import data", "model and data lie in one layer"),
        ("model/vision.py", "import lightning", "lightning may be imported in cli, data.module, training only"),
        ("model/vision.py", "import webdataset as wds", "webdataset may be imported in shards, data only"),
        ("data/text.py", "from pytorch_lightning import seed_everything", "lightning may be imported in"),
        ("data/text.py", "import open_clip.tokenizer", "open_clip may be imported in"),
        ("data/parts/collate.py", "from transformers import BatchEncoding", "transformers may be imported in"),
        ("evaluation/naming.py", "from osm_lightning.model.vision import build", "evaluation never imports model"),
        ("evaluation/naming.py", "from osm_lightning import weights", "evaluation and weights lie in one layer"),
        ("api.py", "import lightning.pytorch", "lightning may be imported in"),
    ],
)
def test_checker_flags_a_forbidden_import(house: Path, path: str, line: str, message: str) -> None:
    with (house / path).open("a") as file:
        file.write(f"{line}\n")
    found = violations(house)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:")
    assert message in found[0]


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("data/utils.py", '"""Odds and ends."""\n', "data/utils.py: 'utils' says nothing"),
        ("data/_helpers.py", '"""Odds and ends."""\n', "'_helpers' says nothing"),
        ("data/common/x.py", '"""Odds and ends."""\n', "'common' says nothing"),
        ("data/bare.py", "import math\n", "data/bare.py: the module has no docstring"),
        ("data/empty.py", "", "data/empty.py: the module has no docstring"),
        ("data/__init__.py", "import math\n", "data/__init__.py: the module has no docstring"),
        ("extra/thing.py", '"""Unplanned."""\n', "extra/thing.py: 'extra' is in no layer"),
    ],
)
def test_checker_flags_a_bad_file(house: Path, path: str, text: str, message: str) -> None:
    (house / path).parent.mkdir(exist_ok=True)
    (house / path).write_text(text)
    found = violations(house)
    assert len(found) == 1
    assert message in found[0]
