"""The API names as the command does, looks at an image once, and says what it cannot take.

On a tiny model of random weights, loaded from an exported folder whose original tokenizers are gone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import ExifTags, Image
from pycocotools import mask as coco_rle
from tiny_checkpoint import MODES, write_checkpoint, write_exported

from osm_lightning import OSM, NamedMask, Scene
from osm_lightning.__main__ import main

HEIGHT, WIDTH = 240, 360
"""Three times what the model sees, so that a mask of one pixel vanishes on the way."""
pytestmark = pytest.mark.usefixtures("one_thread")

NUM_MASKS = 70
"""More than go through the model at once."""
SAME = 1e-6
"""How near two log probabilities of the same computation are."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    write_exported(folder / "exported", folder / "run")
    shutil.rmtree(folder / "run")
    return (folder / "exported").rename(folder / "moved")


@pytest.fixture(scope="module")
def osm(exported: Path) -> OSM:
    return OSM.from_pretrained(exported)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def masks() -> NDArray[np.bool_]:
    """Boxes anywhere, overlapping; two are single pixels, and one is everything."""
    rng = np.random.default_rng(1)
    drawn = np.zeros((NUM_MASKS, HEIGHT, WIDTH), dtype=bool)
    for mask in drawn[:-3]:
        y, x = rng.integers(0, HEIGHT - 20), rng.integers(0, WIDTH - 20)
        mask[y : y + rng.integers(4, 160), x : x + rng.integers(4, 240)] = True
    drawn[-3] = True
    drawn[-2, 0, 0] = drawn[-1, -1, 4] = True
    return drawn


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory, pixels: NDArray[np.uint8], masks: NDArray[np.bool_]) -> Path:
    """A PNG, and beside it the folder of masks that `osm predict` takes."""
    folder = tmp_path_factory.mktemp("photo")
    (folder / "masks" / "photo").mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "photo.png")
    for number, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / "photo" / f"{number}.png")
    return folder / "photo.png"


@pytest.fixture(scope="module")
def scene(osm: OSM, photo: Path) -> Scene:
    return osm.encode(photo)


@pytest.fixture(scope="module")
def named(scene: Scene, masks: NDArray[np.bool_]) -> list[NamedMask]:
    return scene.name(masks, modes=MODES)


def names(found: list[NamedMask], mode: str) -> list[tuple[int, ...]]:
    return [mask.answers[mode].token_ids for mask in found]


def assert_same(found: list[NamedMask], wanted: list[NamedMask], mode: str = "agnostic") -> None:
    assert names(found, mode) == names(wanted, mode)
    for mask, other in zip(found, wanted, strict=True):
        assert mask.answers[mode].logprob == pytest.approx(other.answers[mode].logprob, abs=1e-5)


# The command


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_names_are_those_of_the_command(
    exported: Path, photo: Path, masks: NDArray[np.bool_], tmp_path: Path, precision: str
) -> None:
    words = ["--ckpt", exported, "--images", photo, "--masks", photo.with_name("masks"), "--out", tmp_path / "out"]
    words += ["--modes", ",".join(MODES), "--trainer.precision", precision, "--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *map(str, words)])
    assert stopped.value.code == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    found = OSM.from_pretrained(exported, device="cpu", precision=precision).encode(photo).name(masks, MODES)
    assert [line["mask_id"] for line in lines] == [mask.mask_id for mask in found]
    for line, mask in zip(lines, found, strict=True):
        assert list(line["names"]) == list(mask.answers) == list(MODES)
        for mode, answer in mask.answers.items():
            row = line["names"][mode]
            assert (row["name"], tuple(row["token_ids"])) == (answer.name, answer.token_ids)
            assert row["logprob"] == pytest.approx(answer.logprob, abs=SAME)
            assert row["logprob_no_eos"] == pytest.approx(answer.logprob_no_eos, abs=SAME)


def test_precision_and_mode_matter(
    exported: Path, photo: Path, masks: NDArray[np.bool_], named: list[NamedMask]
) -> None:
    """Or the comparison with the command would say little."""
    assert len({names(named, mode)[0] for mode in MODES}) > 1
    assert len(set(names(named, "agnostic"))) > 5
    rough = OSM.from_pretrained(exported, precision="bf16-mixed").encode(photo).name(masks)
    away = [
        abs(a.answers["agnostic"].logprob - b.answers["agnostic"].logprob) for a, b in zip(rough, named, strict=True)
    ]
    assert max(away) > 100 * SAME


# Encode once, ask often


def test_an_image_is_looked_at_once(osm: OSM, photo: Path, masks: NDArray[np.bool_]) -> None:
    looked, rows = [], []
    hooks = [
        osm.model.vision.register_forward_hook(lambda *_: looked.append(1)),
        osm.model.qformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[2]))),
    ]
    scene = osm.encode(photo)
    assert len(looked) == 1
    for few in (masks[:3], masks[5:6], masks):
        scene.name(few, modes=["agnostic", "coco"])
    for hook in hooks:
        hook.remove()
    assert len(looked) == 1, "a question must not look again"
    assert rows == [3, 3, 1, 1, 64, 6, 64, 6], "many masks go through in chunks"


def test_scenes_know_nothing_of_each_other(
    osm: OSM, scene: Scene, masks: NDArray[np.bool_], named: list[NamedMask]
) -> None:
    other = osm.encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).name(masks[:3])
    assert_same(scene.name(masks[:3]), named[:3])
    assert other[0].answers["agnostic"].logprob != pytest.approx(named[0].answers["agnostic"].logprob, abs=1e-3)


def test_answers_stand_in_the_order_of_the_masks(
    scene: Scene, masks: NDArray[np.bool_], named: list[NamedMask]
) -> None:
    order = np.random.default_rng(2).permutation(NUM_MASKS)
    found = scene.name(masks[order])
    assert [mask.mask_id for mask in found] == [str(number) for number in range(NUM_MASKS)]
    assert {mask.image for mask in found} == {"photo"}
    assert_same(found, [named[number] for number in order])


@pytest.mark.parametrize("form", ["pil", "array", "tensor", "str", "grey and alpha"])
def test_every_form_of_an_image_is_the_same_image(
    osm: OSM, photo: Path, pixels: NDArray[np.uint8], masks: NDArray[np.bool_], named: list[NamedMask], form: str
) -> None:
    forms: dict[str, Any] = {
        "pil": Image.open(photo),
        "array": pixels,
        "tensor": torch.from_numpy(pixels),
        "str": str(photo),
        "grey and alpha": Image.fromarray(np.dstack([pixels, pixels[..., 0]]), "RGBA"),
    }
    scene = osm.encode(forms[form])
    assert scene.size_px == (WIDTH, HEIGHT)
    assert_same(scene.name(masks[:4]), named[:4])


def test_rle_and_tensors_are_the_same_masks(scene: Scene, masks: NDArray[np.bool_], named: list[NamedMask]) -> None:
    packed = [coco_rle.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks[:4]]
    for form in (packed, torch.from_numpy(masks[:4]), list(masks[:4])):
        assert_same(scene.name(form), named[:4])


def test_a_file_is_turned_upright(
    osm: OSM, pixels: NDArray[np.uint8], masks: NDArray[np.bool_], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down
    Image.fromarray(pixels[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    upright = osm.encode(pixels).name(masks[:4])
    assert_same(osm.encode(tmp_path / "turned.png").name(masks[:4]), upright)
    with (
        Image.open(tmp_path / "turned.png") as image,
        pytest.raises(ValueError, match=r"orientation 3.*exif_transpose"),
    ):
        osm.encode(image)


def test_modes_and_length_are_as_asked(scene: Scene, masks: NDArray[np.bool_], named: list[NamedMask]) -> None:
    (mask,) = scene.name(masks[:1], modes=["any", "mine", "mine"], max_new_tokens=2)
    assert list(mask.answers) == ["any", "mine"]
    assert mask.answers["any"].token_ids == named[0].answers["agnostic"].token_ids[:2]
    assert max(len(ids) for ids in names(named, "agnostic")) == 6, "the config's limit"


# Loading


def test_modes_and_device(osm: OSM) -> None:
    assert osm.modes == MODES
    assert osm.to("cpu") is osm
    assert osm.device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in osm.model.parameters())
    assert not osm.model.training


def test_a_ckpt_file_is_loaded_as_its_folder_is(
    tmp_path: Path, photo: Path, masks: NDArray[np.bool_], named: list[NamedMask]
) -> None:
    path = write_checkpoint(tmp_path)
    assert_same(OSM.from_pretrained(path).encode(photo).name(masks[:4]), named[:4])


def test_settings_win_over_the_config(
    tmp_path: Path, photo: Path, masks: NDArray[np.bool_], named: list[NamedMask]
) -> None:
    path = write_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"lacks what the config names:\n  model\.language\.tokenizer: .*llm"):
        OSM.from_pretrained(path)
    osm = OSM.from_pretrained(path, settings={"model.language.tokenizer": "builtin:512", "model.max_new_tokens": 2})
    assert names(osm.encode(photo).name(masks[:4]), "agnostic") == [ids[:2] for ids in names(named[:4], "agnostic")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_parts_may_be_of_half_precision(
    exported: Path, photo: Path, masks: NDArray[np.bool_], named: list[NamedMask], dtype: str
) -> None:
    settings = {"model.language.dtype": dtype, "model.vision.dtype": dtype}
    osm = OSM.from_pretrained(exported, settings=settings)
    assert next(osm.model.language.parameters()).dtype == next(osm.model.vision.tower.parameters()).dtype
    assert str(next(osm.model.language.parameters()).dtype) == f"torch.{dtype}"
    found = osm.encode(photo).name(masks[:8])
    for mask, exact in zip(found, named[:8], strict=True):
        if mask.answers["agnostic"].token_ids == exact.answers["agnostic"].token_ids:
            assert mask.answers["agnostic"].logprob == pytest.approx(exact.answers["agnostic"].logprob, abs=0.3)


def test_loading_draws_none_of_anybodys_random_numbers(exported: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    OSM.from_pretrained(exported)
    assert torch.equal(torch.rand(3), wanted)


# What cannot be


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model.vision.nam": "x"}, "'model.vision.nam', which is no setting of the model"),
        ({"vision.name": "x"}, "'vision.name', which is no setting"),
        ({"model.optim": 1}, "'model.optim', which is no setting"),
        ({"model.vision.name.more": 1}, "which is no setting"),
        ({"model.language.dtype": "float8"}, r"settings cannot be used: [\s\S]*model\.language\.dtype[\s\S]*float8"),
        ({"model.vision.image_size_px": 100}, "must be a multiple of 56"),
        ({"model.language.tokenizer": "builtin:600"}, "the tokenizer has 600 ids"),
        ({"model.vision.architecture": None, "model.vision.name": "/no/vit"}, r"model\.vision\.name: /no/vit"),
        ({"model.language.chat_template": True}, "chat_template is on, but the tokenizer .* has no chat template"),
        ({"model.qformer.width": 16}, "the checkpoint is of another model"),
        ({"model.modes": ["coco"], "model.qformer.num_queries": 3}, "the checkpoint is of another model"),
    ],
)
def test_settings_that_cannot_be_are_refused(exported: Path, setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OSM.from_pretrained(exported, settings=setting)


def test_a_setting_that_is_younger_than_the_checkpoint_can_be_given(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "old")
    config = yaml.safe_load((exported / "config.yaml").read_text())
    for part, name in (("language", "lora"), ("language", "allow"), ("qformer", "lora"), ("vision", "allow")):
        del config["model"][part][name]
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match="no LoRA adapters of the language part"):
        osm = OSM.from_pretrained(tmp_path / "old", settings={"model.language.lora": {"rank": 2}, "model.allow": ["x"]})
    assert osm.model.language.config.lora is not None
    with pytest.raises(ValueError, match="which is no setting of the model"):
        OSM.from_pretrained(tmp_path / "old", settings={"model.language.loro": None})


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        OSM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no checkpoint"):
        OSM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="precision is 'bf16-true', in which only the trainer computes"):
        OSM.from_pretrained(exported, precision="bf16-true")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Path("nowhere.png"), r"there is no file nowhere\.png"),
        (Path(__file__), r"test_api\.py cannot be decoded: it is no JPEG, PNG or WebP"),
        (np.zeros((4, 4), np.uint8), r"image is uint8\[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"image is uint8\[4, 4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"image is float32\[4, 4, 3\]\. Give .* uint8\[height, width, 3\]"),
        (None, "image is NoneType"),
    ],
)
def test_what_is_no_image_is_refused(osm: OSM, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        osm.encode(image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": []}, "masks holds no mask"),
        ({"masks": np.zeros((1, HEIGHT, WIDTH), bool)}, "mask 0 is empty"),
        ({"masks": np.ones((1, WIDTH, HEIGHT), bool)}, "mask 0 is 240 x 360 px, but the image is 360 x 240 px"),
        ({"masks": np.ones((1, HEIGHT, WIDTH))}, "mask 0 is float64"),
        ({"modes": ["lvis"]}, r"'lvis' is not one of this model's \(agnostic, coco, mine\)"),
        ({"modes": []}, "Give a list of some of agnostic, coco, mine"),
        ({"modes": "coco"}, "modes is 'coco'. Give a list"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_questions_that_have_no_answer_are_refused(scene: Scene, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scene.name(**{"masks": np.ones((1, HEIGHT, WIDTH), bool), **changes})


def test_a_probability_that_is_none_is_no_answer(exported: Path, pixels: NDArray[np.uint8]) -> None:
    osm = OSM.from_pretrained(exported)
    osm.model.projection.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"image image, mask 0, mode agnostic.*no number\. Use a higher precision"):
        osm.encode(pixels).name(np.ones((1, HEIGHT, WIDTH), bool))


def test_a_scene_of_another_device_is_refused(osm: OSM, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene, "_device", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="encoded on cuda:0, but the model is on cpu: encode"):
        scene.name(np.ones((1, HEIGHT, WIDTH), bool))


# Importing


def test_importing_is_quick_and_needs_no_trainer() -> None:
    program = """
import sys
import osm_lightning
assert "torch" not in sys.modules, "importing osm_lightning imports torch"
from osm_lightning import OSM, Scene, NamedMask, Answer
assert not {"lightning", "deepspeed", "webdataset"} & set(sys.modules), "the API imports the trainer"
try:
    osm_lightning.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "module 'osm_lightning' has no attribute 'nothing'\n", done.stderr
