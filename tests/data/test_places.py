"""Where batches hold the input: views, nested batches, and several loaders in training and evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.lit import LitNet, trainer
from helpers.raw import RawData, raw_images
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_revbn import InputNorm, OnlineInputNormMixin
from lightning_revbn.core.input_norm import InputError, OnlineStandardizer

IMAGES, LABELS = raw_images(48)
FIRST, SECOND = IMAGES, raw_images(48, seed=1)[0] // 2


def batches(*parts: Any) -> list[Any]:
    """Return the batches of a loader whose batches are lists of parts."""
    return [list(batch) for batch in zip(*(part.split(8) for part in parts), strict=True)]


def made(content: Any) -> Any:
    return DataLoader(content, batch_size=None)


class Views(RawData):
    """Hands over batches that are made already, other ones in evaluation."""

    def __init__(self, settings: InputNorm, training: Any, evaluation: Any = None) -> None:
        super().__init__(settings)
        self.training, self.evaluation = training, training if evaluation is None else evaluation

    def train_dataloader(self) -> Any:
        return self.training

    def val_dataloader(self) -> Any:
        return self.evaluation

    test_dataloader = predict_dataloader = val_dataloader


class Keeping(LitNet):
    """Trains on what `image` finds in a batch, and keeps all batches."""

    def __init__(self, image: Any = None) -> None:
        super().__init__()
        self.image = image or (lambda batch: batch[0])
        self.kept: dict[str, list[Any]] = {"train": [], "eval": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept["train"].append(batch)
        return self.model(self.image(batch)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.kept["eval"].append(batch)

    test_step = predict_step = validation_step


def fit(data: Any, path: Path, image: Any = None, **options: Any) -> dict[str, list[Any]]:
    network = Keeping(image)
    trainer(path, **{"max_epochs": 1, "num_sanity_val_steps": 0, **options}).fit(network, data)
    return network.kept


def both_normalised(views: list[Tensor]) -> Tensor:
    """Return views as one process normalises them by the statistics that they have together."""
    joined = torch.cat([view.double() / 255 for view in views])
    mean, variance = joined.mean((0, 2, 3), keepdim=True), joined.var((0, 2, 3), correction=0, keepdim=True)
    return (joined - mean) / (variance + 1e-5).sqrt()


# --- views ------------------------------------------------------------------------------------------------------------


def test_a_second_view_that_stays_raw_is_told_once_with_both_places(tmp_path: Path) -> None:
    data = Views(InputNorm(3), made(batches(FIRST, SECOND)))
    with pytest.warns(
        UserWarning, match=re.escape("the input is at 0 of the batch (torch.uint8, shape (8, 3, 6, 6))")
    ) as told:
        kept = fit(data, tmp_path, max_epochs=2)
    (text,) = [str(warning.message) for warning in told if "view" in str(warning.message)]
    assert "1 has the same dtype and shape" in text
    assert "InputNorm(key=[0, 1])" in text
    assert "InputNorm(key=0)" in text
    assert torch.equal(kept["train"][0][1], SECOND[:8])


@pytest.mark.parametrize(
    ("make", "both", "alone"),
    [
        (lambda x, y: {"image": x, "more": [y]}, "['image', ('more', 0)]", "'image'"),
        (lambda x, y: (x, {"target": y}), "[0, (1, 'target')]", "0"),
        (lambda x, y: [x, y[..., :4, :4]], "[0, 1]", "0"),
    ],
    ids=["dict", "nested", "smaller crop"],
)
def test_views_anywhere_in_the_batch_are_named(make: Any, both: str, alone: str, tmp_path: Path) -> None:
    data = Views(InputNorm(3), made([make(*pair) for pair in batches(FIRST, SECOND)]))
    with pytest.warns(UserWarning, match=re.escape(f"InputNorm(key={both})")) as told:
        fit(data, tmp_path, lambda batch: next(iter(batch.values())) if isinstance(batch, dict) else batch[0])
    assert any(f"give InputNorm(key={alone})" in str(warning.message) for warning in told)


def test_a_key_says_that_targets_are_meant_to_stay_raw(tmp_path: Path) -> None:
    kept = fit(Views(InputNorm(3, key=0), made(batches(FIRST, SECOND))), tmp_path)  # warnings fail tests
    assert torch.equal(torch.cat([batch[1] for batch in kept["train"] + kept["eval"]]), SECOND.repeat(2, 1, 1, 1))
    fit(Views(InputNorm(3), made(batches(FIRST, SECOND.float(), SECOND[:, :1], LABELS))), tmp_path)


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_views_share_their_statistics(mode: Any, tmp_path: Path) -> None:
    data = Views(InputNorm(3, scale=1.0, mode=mode, key=[0, 1]), made(batches(FIRST, SECOND)))
    kept = fit(data, tmp_path)
    first, second = kept["train"][0]
    torch.testing.assert_close(
        torch.cat([first, second]).double(), both_normalised([FIRST[:8], SECOND[:8]]), rtol=0, atol=1e-5
    )
    joined = torch.cat([FIRST, SECOND]).double() / 255
    torch.testing.assert_close(data.input_statistics().mean, joined.mean((0, 2, 3)), rtol=1e-12, atol=0)
    assert data.input_statistics().count.tolist() == [96 * 36] * 3
    evaluated = torch.cat([batch[place] for place in (0, 1) for batch in kept["eval"]])
    torch.testing.assert_close(evaluated.double(), both_normalised([FIRST, SECOND]), rtol=0, atol=1e-5)


def test_views_of_different_sizes_share_their_statistics_in_the_sanity_check_too(tmp_path: Path) -> None:
    crops = batches(FIRST, SECOND[..., :3, :4])
    data = Views(InputNorm(3, scale=1.0, key=[0, 1]), made(crops))
    kept = fit(data, tmp_path, num_sanity_val_steps=1, limit_val_batches=1)
    values = torch.cat([part.double().transpose(0, 1).flatten(1) / 255 for part in crops[0]], dim=1)
    for stage in ("eval", "train"):
        seen = torch.cat([part.transpose(0, 1).flatten(1) for part in kept[stage][0]], dim=1)
        expected = (values - values.mean(1, keepdim=True)) / (values.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(seen.double(), expected, rtol=0, atol=1e-5)


def test_views_of_different_kinds_are_refused(tmp_path: Path) -> None:
    data = Views(InputNorm(3, key=[0, 1]), made(batches(FIRST, SECOND / 255)))
    with pytest.raises(InputError, match="must all be uint8, all other integers or all floating-point numbers"):
        fit(data, tmp_path)


def test_a_fault_in_the_second_view_is_placed(tmp_path: Path) -> None:
    bad = SECOND.float()
    bad[3, 1, 2, 0] = torch.nan
    data = Views(InputNorm(3, key=[0, 1]), made(batches(FIRST.float(), bad)))
    with pytest.raises(InputError, match=re.escape("first at index (3, 1, 2, 0)")):
        fit(data, tmp_path)
    assert not data.state_dict()["input_norm"]["count"].any()


def test_each_view_has_its_mask(tmp_path: Path) -> None:
    masks = [torch.rand(48, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (1, 2)]
    data = Views(InputNorm(3, key=[0, 1], mask_key=[2, 3]), made(batches(FIRST, SECOND, *masks)))
    kept = fit(data, tmp_path)
    values = torch.cat(
        [view.double()[mask.expand_as(view)].view(-1) for view, mask in zip((FIRST, SECOND), masks, strict=True)]
    )
    weights = data.input_statistics().count
    overall = (data.input_statistics().mean * weights).sum() / weights.sum()
    assert overall.item() * 255 == pytest.approx(values.mean().item(), rel=1e-12)
    for place in (0, 1):
        assert not kept["train"][0][place][~kept["train"][0][place + 2].expand(8, 3, 6, 6)].any()


# --- nested batches ---------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    rgb: Any


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda x: {"image": {"rgb": x, "depth": x}}, ("image", "rgb")),
        (lambda x: ((x, x.clone()), LABELS), (0, 1)),
        (lambda x: [Scene(x), 3], (0, "rgb")),
        (lambda x: {"views": (x, x)}, [("views", 0), ("views", 1)]),
    ],
    ids=["dicts", "tuples", "attribute", "list"],
)
def test_paths_lead_into_nested_batches_and_leave_them_as_they_are(make: Any, key: Any) -> None:
    data = RawData(InputNorm(3, key=key))
    batch = make(IMAGES)
    found = data.select_input(batch)
    new = [IMAGES / 255, IMAGES / 100] if isinstance(key, list) else IMAGES / 255
    changed = data.replace_input(batch, new)
    assert type(changed) is type(batch)
    again = data.select_input(changed)
    for own, old, value in zip(
        *((part if isinstance(part, list) else [part]) for part in (again, found, new)), strict=True
    ):
        assert own is value
        assert torch.equal(old, IMAGES)
    assert torch.equal(torch.cat(flat(data.select_input(batch))), torch.cat(flat(found)))


def flat(found: Any) -> list[Tensor]:
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ([], "must list places"),
        ([0, (0,)], "names a place twice"),
        (1.5, "must be an index, a key or attribute"),
        ([None], "must list places"),
    ],
)
def test_keys_that_name_no_places_are_refused(key: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        InputNorm(3, key=key)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@pytest.mark.parametrize(
    ("settings", "batch", "message"),
    [
        (InputNorm(3, key=[0, -2]), (IMAGES, IMAGES), "place 0 of the input and place -2 of the input"),
        (InputNorm(3, key=["second", -1]), Pair(IMAGES, IMAGES), "place 'second' of the input and place -1"),
        (InputNorm(3, key=[("x", 0), ("x", -1)]), {"x": [IMAGES]}, "place ('x', 0) of the input and place ('x', -1)"),
        (
            {"a": InputNorm(3, key=1), "b": InputNorm(3, key=-1)},
            (IMAGES, IMAGES),
            "place 1 of the input 'a' and place -1 of the input 'b'",
        ),
        (
            {"a": InputNorm(3, key=0), "b": InputNorm(3, key=())},
            IMAGES,
            "place 0 of the input 'a' and place () of the input 'b'",
        ),
    ],
    ids=["tuple", "named tuple", "path", "two inputs", "a tensor"],
)
def test_a_tensor_with_two_names_is_refused_before_it_is_normalised_twice(
    settings: Any, batch: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message) + r".* lead to the same tensor of a batch"):
        RawData(settings).select_input(batch)


def test_the_same_tensor_at_two_places_is_two_tensors() -> None:
    assert [own is IMAGES for own in flat(RawData(InputNorm(3, key=[0, 1])).select_input((IMAGES, IMAGES)))] == [
        True
    ] * 2


def test_masks_must_be_as_many_as_places() -> None:
    with pytest.raises(
        ValueError, match=re.escape("mask_key=[2] must have a mask for each place of the input in training")
    ):
        InputNorm(3, key=[0, 1], mask_key=[2])
    with pytest.raises(
        ValueError,
        match=re.escape(
            "mask_key=[2, 3] must have a mask for each place of the input in evaluation, 0. Give eval_mask"
        ),
    ):
        InputNorm(3, key=[0, 1], mask_key=[2, 3], eval_key=0)


@pytest.mark.parametrize("mask_key", ["mask", ["mask"]], ids=["one", "list"])
def test_evaluation_without_the_masks_of_training_is_told_what_to_do(mask_key: Any, tmp_path: Path) -> None:
    mask = torch.rand(48, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    training = [{"image": image, "mask": own} for image, own in batches(FIRST, mask)]
    evaluation: list[dict[str, Any]] = [{"image": image} for image in FIRST.split(8)]
    settings = InputNorm(3, key=["image"] if isinstance(mask_key, list) else "image", mask_key=mask_key)
    said = r"mask_key='mask'\) names no place in the batch, .* Where these have none, put None there"
    with pytest.raises(TypeError, match=said):
        fit(Views(settings, made(training), made(evaluation)), tmp_path, lambda batch: batch["image"])
    for batch in evaluation:
        batch["mask"] = None
    data = Views(settings, made(training), made(evaluation))
    kept = fit(data, tmp_path, lambda batch: batch["image"])
    torch.testing.assert_close(kept["eval"][0]["image"], data.export_normalizer()(FIRST[:8]))


def test_a_tensor_is_no_container() -> None:
    assert RawData(InputNorm(3, key=0)).select_input(IMAGES) is IMAGES
    for key in (1, (0, 0), "T"):
        with pytest.raises(TypeError, match=re.escape(f"InputNorm(key={key!r}) names no place in the batch, a Tensor")):
            RawData(InputNorm(3, key=key)).select_input(IMAGES)


def test_an_error_names_the_tensors_that_there_are() -> None:
    with pytest.raises(TypeError, match=re.escape("The batch has tensors at (0, 0), (0, 1), 1")):
        RawData(InputNorm(3)).select_input([[IMAGES, IMAGES], LABELS])


def test_settings_with_lists_of_places_can_be_hashed() -> None:
    assert len({InputNorm(3, key=[0, 1]), InputNorm(3, key=[0, 1]), InputNorm(3, key=[0])}) == 2


# --- several loaders --------------------------------------------------------------------------------------------------


def test_dicts_of_loaders_train_and_each_loader_of_evaluation_has_its_structure(tmp_path: Path) -> None:
    loaders = {"labelled": made(batches(FIRST, LABELS)), "unlabelled": made(batches(SECOND))}
    evaluation = [made(batches(FIRST, LABELS)), made([{"image": part} for part in SECOND.split(8)])]
    settings = InputNorm(3, scale=1.0, key=[("labelled", 0), ("unlabelled", 0)], eval_key=[0, "image"])
    data = Views(settings, loaders, evaluation)
    kept = fit(data, tmp_path, lambda batch: batch["labelled"][0])
    assert data.input_statistics().count.tolist() == [96 * 36] * 3
    seen = [batch["image"] if isinstance(batch, dict) else batch[0] for batch in kept["eval"]]
    torch.testing.assert_close(torch.cat(seen).double(), both_normalised([FIRST, SECOND]), rtol=0, atol=1e-5)
    first = kept["train"][0]
    joined = torch.cat([first["labelled"][0], first["unlabelled"][0]])
    torch.testing.assert_close(joined.double(), both_normalised([FIRST[:8], SECOND[:8]]), rtol=0, atol=1e-5)


def test_lists_of_loaders_train_by_paths(tmp_path: Path) -> None:
    data = Views(
        InputNorm(3, key=[(0, 0), (1, 0)], eval_key=0),
        [made(batches(FIRST)), made(batches(SECOND))],
        made(batches(FIRST)),
    )
    fit(data, tmp_path, lambda batch: batch[0][0])
    assert data.input_statistics().count.tolist() == [96 * 36] * 3


def test_a_loader_that_has_ended_is_left_out(tmp_path: Path) -> None:
    loaders = CombinedLoader({"a": made(batches(FIRST)), "b": made(batches(SECOND[:24]))}, "max_size")
    data = Views(InputNorm(3, key=[("a", 0), ("b", 0)], eval_key=0), loaders, made(batches(FIRST)))
    kept = fit(data, tmp_path, lambda batch: batch["a"][0])
    assert kept["train"][-1]["b"] is None
    assert data.input_statistics().count.tolist() == [72 * 36] * 3
    alone = Views(InputNorm(3, key=("b", 0), eval_key=0), loaders, made(batches(FIRST)))
    fit(alone, tmp_path, lambda batch: torch.zeros(8, 3, 6, 6))
    assert alone.input_statistics().count.tolist() == [24 * 36] * 3


def test_evaluation_of_another_structure_points_to_eval_key(tmp_path: Path) -> None:
    loaders = {"labelled": made(batches(FIRST, LABELS))}
    with pytest.raises(TypeError, match="eval_key names the input in batches of evaluation"):
        fit(
            Views(InputNorm(3, key=("labelled", 0)), loaders, made(batches(FIRST, LABELS))),
            tmp_path,
            lambda b: b["labelled"][0],
        )
    with pytest.raises(InputError, match=r"no dimension channel_dim=1. eval_key names the input"):
        fit(Views(InputNorm(3, key=[0, 1]), made(batches(FIRST, SECOND)), made(batches(FIRST, LABELS))), tmp_path)


def test_training_misses_no_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=re.escape("InputNorm(key=1) names no place in the batch, a list of (Tensor)")):
        fit(Views(InputNorm(3, key=[0, 1]), made(batches(FIRST))), tmp_path)


@pytest.mark.parametrize(
    ("selected", "mask", "message"),
    [
        ((FIRST[:8], FIRST[:8]), None, "select_input must return a tensor, a list of tensors, or None, got a tuple"),
        (FIRST[:8].numpy(), None, "select_input must return .* got a ndarray"),
        (FIRST[:8], "m", "select_mask must return .* got a str"),
        ([FIRST[:8], FIRST[:8]], [None], "select_mask must return a mask for each place of the input, 2, got 1"),
    ],
    ids=["tuple", "array", "mask", "number of masks"],
)
def test_overridden_methods_that_return_no_tensors_are_refused(
    selected: Any, mask: Any, message: str, tmp_path: Path
) -> None:
    class Own(Views):
        def select_input(self, batch: Any) -> Any:
            return selected

        def select_mask(self, batch: Any) -> Any:
            return mask

    with pytest.raises(TypeError, match=message):
        fit(Own(InputNorm(3), made(batches(FIRST, SECOND))), tmp_path)


def test_overridden_methods_give_and_take_lists_of_tensors(tmp_path: Path) -> None:
    class Own(Views):
        def select_input(self, batch: Any) -> Any:
            return [batch[0], batch[1]]

        def replace_input(self, batch: Any, value: Any) -> Any:
            return value

    data = Own(InputNorm(3, scale=1.0), made(batches(FIRST, SECOND)))
    kept = fit(data, tmp_path)  # warnings fail tests
    expected = OnlineStandardizer(InputNorm(3, scale=1.0)).train(torch.cat([FIRST[:8], SECOND[:8]]))
    assert torch.equal(torch.cat(kept["train"][0]), expected)
    assert isinstance(data, OnlineInputNormMixin)
