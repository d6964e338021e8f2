"""Which of a dataset's layouts is read, and what is said where none is complete; the subcommands beside `build`."""

import pytest
from coco_folder import SPLIT, coco_of_noise

from osm_lightning.commands.shards import SUBCOMMANDS, main
from osm_lightning.datasets import DATASETS
from osm_lightning.shards import layouts
from osm_lightning.shards.layouts import LAYOUTS, Layout, find_layout


def named(title, *paths, **options):
    return Layout(title, tuple((path, f"{path}.zip") for path in paths), lambda *_: None, **options)


@pytest.fixture
def two(monkeypatch):
    """A dataset with two layouts."""
    rows = (
        named("raw", "maps/{folder}", "images/{folder}", folders={"val": "validation"}),
        named("prepared", "{split}.json|tables/{split}.json"),
    )
    monkeypatch.setitem(layouts.LAYOUTS, "coco", rows)


def test_the_first_layout_that_is_complete_is_read(two, tmp_path):
    (tmp_path / "maps" / "validation").mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "val.json").touch()
    assert find_layout("coco", tmp_path, "val").title == "prepared"
    (tmp_path / "images" / "validation").mkdir(parents=True)
    assert find_layout("coco", tmp_path, "val").title == "raw"


def test_of_each_layout_it_is_said_what_is_missing_and_where_it_is(two, tmp_path):
    (tmp_path / "maps" / "validation").mkdir(parents=True)
    with pytest.raises(ValueError, match="does not hold split val of coco") as caught:
        find_layout("coco", tmp_path, "val")
    assert str(caught.value).splitlines()[1:-1] == [
        "  raw lacks",
        "    images/validation (images/{folder}.zip)",
        "  prepared lacks",
        "    val.json or tables/val.json ({split}.json|tables/{split}.json.zip)",
    ]


def test_rows_are_those_of_datasets():
    assert LAYOUTS.keys() <= DATASETS.keys()
    assert all(len({layout.title for layout in rows}) == len(rows) for rows in LAYOUTS.values())


def test_the_layout_that_is_read_is_named(tmp_path, capsys):
    root = coco_of_noise(tmp_path / "raw", 1).root
    words = ["--src", str(root), "--split", SPLIT, "--out", str(tmp_path / "out"), "--workers", "1"]
    main(["build", "coco", *words])
    assert f"{root}: COCO panoptic, as downloaded\n" in capsys.readouterr().out


def test_help_lists_all_subcommands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {name} " in printed for name in SUBCOMMANDS)


def test_only_a_command_that_takes_settings_takes_other_words(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["build", "coco", "--split", SPLIT, "--data.num_workers", "0"])
    assert "unrecognized arguments: --data.num_workers 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no --config is given"):
        main(["browse", "--out", str(tmp_path / "page.html"), "--data.num_workers", "0"])
