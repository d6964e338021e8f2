from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_shards import CAR, DOG, LEFT, PERSON, RIGHT, make_record, rectangle, write_sizes, write_split

from osm_lightning.batch import AGNOSTIC, FREE_TEXT, MaskBatch
from osm_lightning.data.module import OSMData, SourceConfig
from osm_lightning.instructions import TEST_QUESTION, prompt
from osm_lightning.record import Segment

pytestmark = [  # true of others' data, and of folders that others use
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

SCENES = Path(__file__).parents[2] / "data_shards" / "scenes"


def make_data(sources, **settings):
    defaults = {
        "tokenizer": "builtin:300",
        "modes": ["mine", "other"],
        "image_size_px": 28,
        "masks_per_image": 2,
        "masks_per_epoch": 24,
        "min_mask_px": 4,
        "num_workers": 0,
    }
    return OSMData(sources, **(defaults | settings))


def act_as_rank(data, rank, count):
    data.trainer = SimpleNamespace(global_rank=rank, world_size=count, limit_train_batches=1.0)
    return data


@pytest.fixture
def folder(tmp_path):
    """A shard folder with 6 training and 5 validation images of three masks each."""
    return write_sizes(write_sizes(tmp_path / "shards", [4, 2], "train"), [2, 3], "val")


@pytest.fixture
def source(folder):
    return SourceConfig(str(folder), quota=4)


class Watcher(lightning.LightningModule):
    """Keeps what a trainer hands it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_index):
        assert isinstance(batch, MaskBatch)
        self.trained.append((self.current_epoch, batch.keys, batch.mask_ids))
        return self.weight.sum()

    def validation_step(self, batch, batch_index):
        self.validated += batch.keys

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, *, max_steps=-1, ckpt_path=None):
    """Trains for two epochs or so many steps; leaves a checkpoint of the last step."""
    watcher = Watcher()
    trainer = lightning.Trainer(
        max_epochs=2,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(watcher, datamodule=data, ckpt_path=ckpt_path)
    return watcher


def test_a_trainer_gets_all_of_it(source, tmp_path):
    watcher = fit(make_data({"mine": source}), tmp_path)
    first, second = ([step[1:] for step in watcher.trained if step[0] == epoch] for epoch in (0, 1))
    assert len(first) == len(second) == 6
    assert first != second
    assert watcher.validated == [f"val-{n}" for n in range(5)] * 2


def test_a_resumed_run_goes_on_with_the_batches_of_a_whole_one(source, tmp_path):
    whole = fit(make_data({"mine": source}), tmp_path / "whole").trained
    for steps in (6, 4):  # at the end of the first epoch, and within it
        folder = tmp_path / str(steps)
        fit(make_data({"mine": source}), folder, max_steps=steps)
        resumed = fit(make_data({"mine": source}), folder, ckpt_path=folder / "last.ckpt").trained
        assert resumed == whole[steps:]


def test_training_batches_mix_the_sources(source):
    data = make_data({"mine": source, "second": replace(source, quota=2, mode="other")})
    batches = list(data.train_dataloader())
    assert len(batches) == 4  # 24 masks, 6 of them in a step
    for batch in batches:
        assert batch.datasets == ("mine", "second")
        assert Counter(zip(batch.dataset_M.tolist(), batch.mode_M.tolist(), strict=True)) == {
            (0, AGNOSTIC): 2,
            (0, 1): 2,
            (1, AGNOSTIC): 1,
            (1, 2): 1,
        }
        assert batch.images_I3SS.shape[1:] == (3, 28, 28)
        assert set(batch.class_id_M.tolist()) <= {PERSON, CAR, DOG}


def test_ranks_share_the_masks_of_an_epoch_and_not_the_images(source):
    data = make_data({"mine": replace(source, quota=2)}, masks_per_image=1, masks_per_epoch=4)
    read = []
    for rank in range(2):
        batches = list(act_as_rank(data, rank, 2).train_dataloader())
        assert len(batches) == 1
        read.append({key for batch in batches for key in batch.keys})
    assert read[0] & read[1] == set()


def test_an_epoch_has_at_least_one_batch(source):
    assert len(make_data({"mine": source}, masks_per_epoch=1).train_dataloader()) == 1


def test_a_source_that_is_left_out_of_training_is_validated_all_the_same(source):
    data = make_data({"mine": source, "other": replace(source, train=None), "third": replace(source, val=None)})
    assert data.val_names() == ("mine", "other")
    assert [next(iter(loader)).datasets for loader in data.val_dataloader()] == [("mine",), ("other",)]
    with pytest.raises(ValueError, match="'third' is not one of this model's"):
        data.train_dataloader()
    del data.sources["third"]
    assert next(iter(data.train_dataloader())).datasets == ("mine",)


@pytest.mark.parametrize("images_per_val_batch", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_takes_every_mask_of_every_image_once(source, images_per_val_batch, num_workers):
    data = make_data({"mine": source}, images_per_val_batch=images_per_val_batch, num_workers=num_workers)
    (loader,) = data.val_dataloader()
    batches = list(loader)
    assert [key for batch in batches for key in batch.keys] == [f"val-{n}" for n in range(5)]
    assert len(batches) == {1: 5, 3: 2}[images_per_val_batch]
    for batch in batches:
        assert batch.mask_ids == ("s1", "s2", "s3") * batch.num_images
        assert batch.image_index_M.tolist() == [i for i in range(batch.num_images) for _ in range(3)]
        assert batch.class_id_M.tolist() == [PERSON, CAR, DOG] * batch.num_images
        assert set(batch.mode_M.tolist()) == {AGNOSTIC}
        asked = {
            data.codec.decode(ids[:count].tolist())
            for ids, count in zip(batch.text_ids_ML, batch.prompt_tokens_M, strict=True)
        }
        assert asked == {prompt(TEST_QUESTION)}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ranks_split_validation_without_repeats(source, count):
    read = Counter()
    for rank in range(count):
        (loader,) = act_as_rank(make_data({"mine": source}), rank, count).val_dataloader()
        read.update(key for batch in loader for key in batch.keys)
    assert read == Counter({f"val-{n}": 1 for n in range(5)})


def test_fewer_images_than_processes_leave_none_without_a_batch(source):
    """Lightning would end the run, or leave validation out on that process while the others wait for it."""
    num_masks = []
    for rank in range(7):
        (loader,) = act_as_rank(make_data({"mine": source}), rank, 7).val_dataloader()
        (batch,) = loader
        num_masks.append(batch.num_masks)
    assert num_masks == [3, 3, 3, 3, 3, 0, 0]


def test_validation_does_not_touch_the_training_splits(folder, source):
    (folder / "train-00000.tar").unlink()
    assert len(list(make_data({"mine": source}).val_dataloader()[0])) == 5


def test_the_scenes_that_ship_bring_their_own_vocabulary():
    data = make_data({"scenes": SourceConfig(str(SCENES), quota=4)}, modes=["scenes"], image_size_px=56)
    vocabulary = data.labels("scenes").vocabulary
    assert vocabulary is not None
    assert len(vocabulary) > 200
    (loader,) = data.val_dataloader()
    batch = next(iter(loader))
    for ids, class_id, prompt_tokens, tokens in zip(
        batch.text_ids_ML.tolist(), batch.class_id_M.tolist(), batch.prompt_tokens_M, batch.text_tokens_M, strict=True
    ):
        assert vocabulary.is_first_name(data.codec.decode(ids[prompt_tokens : tokens - 1]), class_id)
    assert next(iter(data.train_dataloader())).num_masks == 4


def test_a_vocabulary_of_the_config_wins(folder, source, tmp_path):
    table = tmp_path / "mine.tsv"
    table.write_text(f"id\tkind\tnames\n{PERSON}\tany\thuman\n{CAR}\tany\tcart\n{DOG}\tany\thound\n")
    data = make_data({"mine": replace(source, vocabulary=str(table))})
    batch = next(iter(data.val_dataloader()[0]))
    words = [
        data.codec.decode(row[prompt_tokens : tokens - 1].tolist())
        for row, prompt_tokens, tokens in zip(
            batch.text_ids_ML, batch.prompt_tokens_M, batch.text_tokens_M, strict=True
        )
    ]
    assert words == [" human", " cart", " hound"]


def test_a_split_that_is_missing_names_those_that_are_there(source):
    for data, ask in (
        (make_data({"mine": replace(source, train="train2017")}), OSMData.train_dataloader),
        (make_data({"mine": replace(source, val="train2017")}), OSMData.val_dataloader),
    ):
        with pytest.raises(ValueError, match="no split 'train2017'; it has train, val"):
            ask(data)


def test_a_folder_that_is_missing_is_named(source, tmp_path):
    data = make_data({"mine": replace(source, shards=str(tmp_path / "nowhere"))})
    with pytest.raises(ValueError, match=r"nowhere has no readable index\.json"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("setting", "value"), [("max_skipped", 1.5), ("max_skipped", -0.1), ("repeat_threshold", 0.0), ("weight", 0.0)]
)
def test_settings_of_a_source_that_no_data_could_make_work(source, setting, value):
    with pytest.raises(ValueError, match=rf"data\.sources\.mine\.{setting} is {value}, but must be"):
        make_data({"mine": replace(source, **{setting: value})})


@pytest.mark.parametrize(("limit", "taken"), [(1.0, 6), (0.5, 3), (4, 4), (9, 6)])
def test_an_epoch_ends_where_the_trainer_ends_it(source, limit, taken):
    data = make_data({"mine": source})
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, limit_train_batches=limit)
    assert data.batches_per_epoch == data.train_dataloader().batches_taken == taken
    assert len(data.train_dataloader()) == 6


def test_without_a_training_split_there_is_nothing_to_train_on(source):
    with pytest.raises(ValueError, match=r"data\.sources holds nothing to train on"):
        make_data({"mine": replace(source, train=None)}).train_dataloader()


@pytest.mark.parametrize(("quota", "agnostic_share"), [(3, 0.5), (0, 0.5), (-2, 0.5), (2, 0.25), (5, 0.3)])
def test_a_quota_that_the_modes_do_not_divide(source, quota, agnostic_share):
    data = make_data({"mine": replace(source, quota=quota)}, agnostic_share=agnostic_share)
    with pytest.raises(ValueError, match=rf"data\.sources\.mine\.quota is {quota}, .*\({agnostic_share}\)") as refused:
        data.train_dataloader()
    assert f"Use {quota}," not in str(refused.value)


@pytest.mark.parametrize(("quota", "agnostic_share"), [(3, 0.0), (3, 1.0), (4, 0.25), (10, 0.3), (1, 1)])
def test_a_quota_that_they_do_divide(source, quota, agnostic_share):
    data = make_data({"mine": replace(source, quota=quota)}, agnostic_share=agnostic_share)
    batch = next(iter(data.train_dataloader()))
    assert Counter(batch.mode_M.tolist())[AGNOSTIC] == round(quota * agnostic_share)


def test_without_a_quota_a_source_takes_the_tables_or_four(tmp_path):
    folder = write_sizes(tmp_path / "shards", [3])
    for dataset, quota in (("mine", 4), ("lvis", 16)):
        index = folder / "index.json"
        index.write_text(index.read_text().replace('"dataset": "mine"', f'"dataset": "{dataset}"'))
        batch = next(iter(make_data({"mine": SourceConfig(str(folder))}).train_dataloader()))
        assert batch.num_masks == quota


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("masks_per_image", 0),
        ("images_per_val_batch", 0),
        ("min_mask_px", -1),
        ("agnostic_share", 1.5),
        ("agnostic_share", -0.5),
        ("scale", (1.5, 0.5)),
        ("scale", (0.0, 1.0)),
        ("scale", (-1.0, 1.0)),
    ],
)
def test_a_setting_out_of_its_range_is_named(source, setting, value):
    with pytest.raises(ValueError, match=rf"data\.{setting} is .*but must be"):
        make_data({"mine": source}, **{setting: value})


def test_an_unknown_mode_names_those_of_the_model(source):
    data = make_data({"mine": replace(source, mode="elsewhere")})
    with pytest.raises(ValueError, match=r"'elsewhere' is not one of this model's \(agnostic, mine, other\)"):
        data.train_dataloader()


def test_there_is_nothing_to_predict_without_records(source):
    with pytest.raises(ValueError, match="nothing to predict"):
        make_data({"mine": source}).predict_dataloader()


def test_prediction_names_every_mask_that_it_was_given():
    data = make_data({})
    thin = rectangle(150, 100, 151, 104, 200, 300)  # nothing is left of it at 28 px
    data.predicted = [
        make_record("b", [RIGHT, LEFT], [Segment("m2"), Segment("m1")], as_rle=True),
        make_record("a", [thin], [Segment("thin")], as_rle=True),
    ]
    batches = list(data.predict_dataloader())
    assert [(batch.keys, batch.mask_ids) for batch in batches] == [(("b",), ("m2", "m1")), (("a",), ("thin",))]
    for batch in batches:
        assert batch.datasets == ("predicted",)
        assert set(batch.class_id_M.tolist()) == {FREE_TEXT}
        assert torch.equal(batch.text_tokens_M, batch.prompt_tokens_M)  # no answer to read off
        assert bool((batch.coverage_MGG.sum(dim=(1, 2)) > 0).all())


def test_free_text_names_need_no_vocabulary(tmp_path):
    segments = [Segment("s1", name="Red kite"), Segment("s2")]
    folder = write_split(tmp_path / "free", [[make_record("k", [LEFT, RIGHT], segments)]], vocabulary=None)
    data = make_data({"mine": SourceConfig(str(folder), val=None, quota=2)})
    assert data.labels("mine").vocabulary is None
    batch = next(iter(data.train_dataloader()))
    assert set(batch.mask_ids) == {"s1"}
    assert set(batch.class_id_M.tolist()) == {FREE_TEXT}
