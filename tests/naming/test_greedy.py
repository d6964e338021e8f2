"""Greedy naming against chains of known probability; that it equals naming one by one is `tests/reference/`'s."""

from __future__ import annotations

from dataclasses import replace
from math import log
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from osm_lightning.batch import MaskBatch
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.lockstep import Lockstep
from osm_lightning.model.osm import OSM
from osm_lightning.naming.greedy import MAX_NEW_TOKENS, Generated, generate_greedy, name_masks

EOS, OTHER_EOS = 0, 5
CHAIN = torch.tensor(
    [
        # EOS   1     2     3     4   OTHER_EOS
        [1.00, 0.00, 0.00, 0.00, 0.00, 0.00],
        [0.10, 0.00, 0.60, 0.30, 0.00, 0.00],  # 1 -> 2
        [0.20, 0.00, 0.00, 0.70, 0.10, 0.00],  # 2 -> 3
        [0.90, 0.05, 0.05, 0.00, 0.00, 0.00],  # 3 -> EOS
        [0.25, 0.00, 0.00, 0.00, 0.75, 0.00],  # 4 -> 4 without end
        [0.00, 0.00, 0.20, 0.00, 0.00, 0.80],
    ]
)
"""Row: probabilities of the token after it."""


class Chain:
    """A language model whose next token depends on the last one alone."""

    def __init__(self) -> None:
        self.rows_run: list[int] = []

    def embed(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, len(CHAIN)).float()

    def new_cache(self) -> DynamicCache:
        return DynamicCache()

    def hidden(self, inputs_MXZ: Tensor, cache: Any) -> Tensor:
        self.rows_run.append(len(inputs_MXZ))
        return inputs_MXZ

    def logits(self, hidden_PZ: Tensor) -> Tensor:
        return (hidden_PZ @ CHAIN).clamp_min(1e-12).log()


def generate(last_ids: list[int], chain: Chain | None = None, **changes: Any) -> list[Generated]:
    chain = chain or Chain()
    ids = [[3, 1, last] for last in last_ids]
    prefix = chain.embed(torch.tensor(ids, dtype=torch.int64).reshape(-1, 3))
    return generate_greedy(chain, prefix, **{"eos_ids": (EOS, OTHER_EOS), **changes})


class TestGenerateGreedy:
    def test_ids_and_probabilities_are_the_chain_s(self) -> None:
        ends_late, ends_at_once, never_ends = generate([1, 3, 4])
        assert ends_late.token_ids == [2, 3]
        assert ends_late.logprob_no_eos == pytest.approx(log(0.6) + log(0.7), abs=1e-6)
        assert ends_late.logprob == pytest.approx(log(0.6) + log(0.7) + log(0.9), abs=1e-6)
        assert ends_at_once.token_ids == []
        assert ends_at_once.logprob_no_eos == 0.0
        assert ends_at_once.logprob == pytest.approx(log(0.9), abs=1e-6)
        assert never_ends.token_ids == [4] * MAX_NEW_TOKENS
        assert never_ends.logprob == pytest.approx(MAX_NEW_TOKENS * log(0.75), abs=1e-5)
        assert never_ends.logprob == never_ends.logprob_no_eos

    def test_any_of_several_eos_ids_ends_a_row(self) -> None:
        assert generate([OTHER_EOS])[0].token_ids == []
        assert generate([OTHER_EOS], eos_ids=(EOS,), max_new_tokens=3)[0].token_ids == [OTHER_EOS] * 3

    def test_a_limit_cuts_a_name_before_its_eos(self) -> None:
        cut = generate([1], max_new_tokens=2)[0]
        assert cut.token_ids == [2, 3]
        assert cut.logprob == cut.logprob_no_eos == pytest.approx(log(0.6) + log(0.7), abs=1e-6)
        assert generate([1], max_new_tokens=3)[0].logprob < cut.logprob

    def test_rows_that_have_ended_are_not_run_again(self) -> None:
        chain = Chain()
        results = generate([3, 1, 4, 2, 3], chain, max_new_tokens=6)
        assert [result.token_ids for result in results] == [[], [2, 3], [4] * 6, [3], []]
        assert chain.rows_run == [5, 3, 2, 1, 1, 1]

    def test_it_stops_when_all_have_ended(self) -> None:
        chain = Chain()
        generate([1, 2, 3], chain)
        assert chain.rows_run == [3, 2, 1]

    def test_no_rows_need_no_run(self) -> None:
        chain = Chain()
        assert generate([], chain) == []
        assert chain.rows_run == []


def tiny_model() -> OSM:
    torch.manual_seed(0)
    vit = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    llm = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
        "initializer_range": 0.5,
    }
    qformer = QFormerConfig(num_layers=2, width=8, num_heads=2, ffn_width=12, num_queries=2)
    vision = VisionConfig("dinov2", architecture=vit, image_size_px=16, window_size_px=8, patch_size_px=4)
    model = OSM(vision, qformer, LanguageConfig(architecture=llm, dtype="float32"), ["coco", "lvis"])
    with torch.no_grad():
        model.modes.embedding.mul_(100)  # so that modes say different things
    return model.eval()


def tiny_batch(num_masks: int = 3) -> MaskBatch:
    return MaskBatch(
        images_I3SS=torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8),
        image_index_M=torch.tensor([0, 0, 1])[:num_masks],
        coverage_MGG=torch.rand(3, 4, 4).half()[:num_masks],
        context_box_px_M4=torch.tensor([[0, 0, 5, 5], [3, 3, 15, 15], [8, 0, 15, 7]])[:num_masks],
        mode_M=torch.zeros(3, dtype=torch.int64)[:num_masks],
        dataset_M=torch.zeros(3, dtype=torch.int64)[:num_masks],
        class_id_M=torch.zeros(3, dtype=torch.int64)[:num_masks],
        text_ids_ML=torch.tensor([[11, 12, 13, 14], [11, 12, 2, 0], [11, 12, 4, 2]])[:num_masks],
        prompt_tokens_M=torch.tensor([2, 2, 2])[:num_masks],
        text_tokens_M=torch.tensor([4, 3, 4])[:num_masks],
        instruction_ids_MT=torch.zeros(3, 0, dtype=torch.int64)[:num_masks],
        instruction_tokens_M=torch.zeros(3, dtype=torch.int64)[:num_masks],
        datasets=("coco",),
        keys=("one", "two"),
        mask_ids=("a", "b", "c")[:num_masks],
    )


class Exchange:
    """Where threads that stand for processes put their numbers."""

    def __init__(self, num_ranks: int) -> None:
        self.numbers, self.barrier = [0] * num_ranks, Barrier(num_ranks, timeout=60)

    def most(self, rank: int, number: int) -> int:
        self.numbers[rank] = number
        self.barrier.wait()
        found = max(self.numbers)
        self.barrier.wait()
        return found


class Together(Lockstep):
    """One of the processes."""

    together = True

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self.exchange, self.rank = exchange, rank

    def most(self, count: int) -> int:
        return self.exchange.most(self.rank, count)


def spelled(ids: Any) -> str:
    return " " + " ".join(map(str, ids)) + " "


class TestNameMasks:
    def test_every_mask_is_named_in_every_mode_and_knows_its_image(self) -> None:
        model, batch = tiny_model(), tiny_batch()
        named = name_masks(model, model.encode(batch.images_I3SS), batch, ["lvis", "agnostic"], spelled, (2,), 4)
        assert [(mask.image, mask.mask_id) for mask in named] == [("one", "a"), ("one", "b"), ("two", "c")]
        for mask in named:
            assert list(mask.answers) == ["lvis", "agnostic"]
            for answer in mask.answers.values():
                assert answer.name == " ".join(map(str, answer.token_ids))
        assert any(mask.answers["lvis"].token_ids != mask.answers["agnostic"].token_ids for mask in named)

    def test_answers_and_modes_of_the_batch_are_ignored(self) -> None:
        model, batch = tiny_model(), tiny_batch()
        images = model.encode(batch.images_I3SS)
        other_ids = batch.text_ids_ML.clone()
        other_ids[:, 2:] = 9
        other = replace(batch.in_mode(2), text_ids_ML=other_ids, text_tokens_M=batch.text_tokens_M * 0 + 4)
        assert name_masks(model, images, other, ["coco"], spelled, (2,)) == name_masks(
            model, images, batch, ["coco"], spelled, (2,)
        )

    def test_the_size_of_a_chunk_changes_no_name(self) -> None:
        model, batch = tiny_model(), tiny_batch()
        images = model.encode(batch.images_I3SS)
        wanted = name_masks(model, images, batch, ["coco"], spelled, (2,))
        for mask, other in zip(
            wanted, name_masks(model, images, batch, ["coco"], spelled, (2,), rows_per_chunk=1), strict=True
        ):
            assert other.answers["coco"].token_ids == mask.answers["coco"].token_ids
            assert other.answers["coco"].logprob == pytest.approx(mask.answers["coco"].logprob, abs=1e-5)

    def test_processes_that_share_weights_call_every_module_alike(self) -> None:
        """One has three chunks and the other one: a call that only one of them made would hang both."""
        most, called, named = Exchange(2), ([], []), [None, None]
        models, batches = [tiny_model() for _ in called], [tiny_batch(3), tiny_batch(1)]
        images = [model.encode(batch.images_I3SS) for model, batch in zip(models, batches, strict=True)]
        parts = list(zip(models, images, batches, strict=True))
        wanted = [name_masks(*of_rank, ["coco", "lvis"], spelled, (2, 7)) for of_rank in parts]
        for rank, model in enumerate(models):
            model.lockstep = Together(most, rank)
            for name, module in model.named_modules():
                if next(module.parameters(recurse=False), None) is not None:
                    module.register_forward_pre_hook(lambda *_, name=name, calls=called[rank]: calls.append(name))

        def work(rank: int) -> None:
            named[rank] = name_masks(*parts[rank], ["coco", "lvis"], spelled, (2, 7), rows_per_chunk=1)

        threads = [Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert called[0] == called[1]
        assert len([name for name in called[0] if name == "qformer.layers.0.self_attention.query"]) == 3 * 2
        for found, alone in zip(named, wanted, strict=True):
            assert [mask.answers["lvis"].token_ids for mask in found] == [
                mask.answers["lvis"].token_ids for mask in alone
            ]

    def test_the_agnostic_mode_has_an_alias(self) -> None:
        model, batch = tiny_model(), tiny_batch()
        images = model.encode(batch.images_I3SS)
        aliased = name_masks(model, images, batch, ["any"], spelled, (2,))
        plain = name_masks(model, images, batch, ["agnostic"], spelled, (2,))
        assert [mask.answers["any"] for mask in aliased] == [mask.answers["agnostic"] for mask in plain]

    def test_an_image_without_masks_yields_none(self) -> None:
        model, batch = tiny_model(), tiny_batch(0)
        assert name_masks(model, model.encode(batch.images_I3SS), batch, ["coco"], spelled, (2,)) == []

    @pytest.mark.parametrize("ids", [[[11, 12, 13, 14], [11, 7, 2, 0], [11, 12, 4, 2]], None])
    def test_prompts_that_differ_are_refused(self, ids: list[list[int]] | None) -> None:
        model, batch = tiny_model(), tiny_batch()
        if ids is None:
            batch = replace(batch, prompt_tokens_M=torch.tensor([2, 1, 2]))
        else:
            batch = replace(batch, text_ids_ML=torch.tensor(ids))
        with pytest.raises(ValueError, match="share one prompt"):
            name_masks(model, model.encode(batch.images_I3SS), batch, ["coco"], spelled, (2,))

    def test_a_mode_that_the_model_lacks_is_refused(self) -> None:
        model, batch = tiny_model(), tiny_batch()
        with pytest.raises(ValueError, match=r"'ade20k' is not one of this model's \(agnostic, coco, lvis\)"):
            name_masks(model, model.encode(batch.images_I3SS), batch, ["ade20k"], spelled, (2,))
