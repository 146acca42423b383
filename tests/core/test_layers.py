from __future__ import annotations

from typing import Any

import pytest
import timm.layers
import torch
import torchvision
from helpers.models import BATCH_NORMS, Softplus, residual_net
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

from lightning_revbn import find_batch_norms
from lightning_revbn.core.layers import is_flattened


def verdicts(module: nn.Module, *args: Any, **options: Any) -> dict[str, tuple[str, str]]:
    return {record.name: (record.verdict, record.state) for record in find_batch_norms(module, *args, **options)}


FRESH = ("rewrite", "fresh")


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_batch_norm_class_of_torch_is_found(cls: type[nn.Module]) -> None:
    assert verdicts(nn.Sequential(nn.ReLU(), cls(4))) == {"1": FRESH}


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LocalResponseNorm(2)]
)
def test_other_norms_are_not_batch_norm(layer: nn.Module) -> None:
    assert verdicts(nn.Sequential(layer)) == {}


def test_a_record_tells_the_layer_its_channels_and_its_parameters() -> None:
    model = residual_net(width=7)
    record = find_batch_norms(model, 0.25)[1]
    assert (record.name, record.module, record.channels, record.target) == ("bn1", model.bn1, 7, 0.25)
    assert record.scale is model.bn1.weight
    assert record.shift is model.bn1.bias
    assert record.reason == "freshly initialised"


def test_looking_changes_nothing() -> None:
    model = residual_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_batch_norms(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_batch_norm_layer_itself_is_found_under_the_empty_name() -> None:
    assert verdicts(nn.BatchNorm2d(3)) == {"": FRESH}


def test_a_layer_without_affine_has_no_scale() -> None:
    assert verdicts(nn.Sequential(nn.BatchNorm2d(3, affine=False))) == {"0": ("skip", "no scale")}


def test_a_frozen_scale_is_skipped() -> None:
    model = residual_net()
    model.bn1.weight.requires_grad_(False)
    assert verdicts(model)["bn1"] == ("skip", "frozen")


@pytest.mark.parametrize(("policy", "verdict"), [("keep", "skip"), ("overwrite", "rewrite")])
def test_a_scale_started_at_zero_follows_its_policy(policy: str, verdict: str) -> None:
    model = residual_net(zero_init_residual=True)
    assert verdicts(model, zero_scale=policy) == {"stem.1": FRESH, "bn1": FRESH, "bn2": (verdict, "zero")}


def moved_mean(layer: nn.BatchNorm2d) -> None:
    assert layer.running_mean is not None
    layer.running_mean[2] = 0.5


def moved_variance(layer: nn.BatchNorm2d) -> None:
    assert layer.running_var is not None
    layer.running_var[0] = 1.5


def tracked_batch(layer: nn.BatchNorm2d) -> None:
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked += 1


def own_scale(layer: nn.BatchNorm2d) -> None:
    with torch.no_grad():
        layer.weight[1] = 0.7


@pytest.mark.parametrize(("policy", "verdict"), [("keep", "skip"), ("overwrite", "rewrite"), ("error", "refuse")])
@pytest.mark.parametrize("sign", [moved_mean, moved_variance, tracked_batch, own_scale])
def test_each_sign_of_training_makes_a_layer_trained(sign: Any, policy: str, verdict: str) -> None:
    model = residual_net()
    sign(model.bn1)
    found = verdicts(model, trained=policy)
    assert found == {"stem.1": FRESH, "bn1": (verdict, "trained"), "bn2": FRESH}


def test_a_trained_layer_whose_scale_became_zero_is_trained_not_zero() -> None:
    model = residual_net(zero_init_residual=True)
    model(torch.randn(4, 3, 6, 6))
    assert verdicts(model)["bn2"] == ("skip", "trained")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_already_at_the_target_is_still_fresh_in_every_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4)).to(dtype)
    nn.init.constant_(model[0].weight, 0.1)
    assert verdicts(model, 0.1) == {"0": FRESH}
    assert verdicts(model, 0.2) == {"0": ("skip", "trained")}


@pytest.mark.parametrize("before", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("after", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_layer_converted_to_another_precision_is_still_at_the_target(before: torch.dtype, after: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4)).to(before)
    nn.init.constant_(model[0].weight, 0.1)
    assert verdicts(model.to(after), 0.1) == {"0": FRESH}


def test_a_layer_without_running_statistics_is_judged_by_its_scale() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    assert verdicts(model) == {"0": FRESH}


def test_include_and_exclude_select_by_dotted_name() -> None:
    out = ("skip", "excluded")
    assert verdicts(residual_net(), include=["bn*"]) == {"stem.1": out, "bn1": FRESH, "bn2": FRESH}
    assert verdicts(residual_net(), exclude=["bn2", "stem.*"]) == {"stem.1": out, "bn1": FRESH, "bn2": out}
    assert verdicts(residual_net(), include="bn?", exclude="bn1") == {"stem.1": out, "bn1": out, "bn2": FRESH}


def test_of_a_scale_mapping_the_first_match_counts_and_the_rest_is_left_alone() -> None:
    targets = {record.name: record.target for record in find_batch_norms(residual_net(), {"bn1": 0.5, "bn*": 0.25})}
    assert targets == {"stem.1": None, "bn1": 0.5, "bn2": 0.25}


@pytest.mark.parametrize(
    "options",
    [{"include": ["bn3"]}, {"exclude": ["bn3"]}, {"scale": {"*": 0.1, "bn3": 0.2}}],
    ids=["in", "ex", "scale"],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"the pattern 'bn3' matches none of the model's 3 batch norm.*nearest names are 'bn"
    ):
        find_batch_norms(residual_net(), **options)


def test_a_literal_name_wins_over_its_reading_as_a_pattern() -> None:
    model = nn.ModuleDict({"a[0]": nn.BatchNorm2d(4), "a0": nn.BatchNorm2d(4), "a1": nn.BatchNorm2d(4)})
    out = ("skip", "excluded")
    assert verdicts(model, exclude=["a[0]"]) == {"a[0]": out, "a0": FRESH, "a1": FRESH}
    assert verdicts(model, include=["a[0]"]) == {"a[0]": FRESH, "a0": out, "a1": out}
    assert verdicts(model, include=["a[01]"]) == {"a[0]": out, "a0": FRESH, "a1": FRESH}
    targets = {record.name: record.target for record in find_batch_norms(model, {"a[0]": 0.5, "a?": 0.25})}
    assert targets == {"a[0]": 0.5, "a0": 0.25, "a1": 0.25}


def test_a_pattern_is_no_error_in_a_model_without_batch_norm() -> None:
    assert find_batch_norms(nn.Linear(2, 2), include=["backbone.*"]) == []


@pytest.mark.parametrize("scale", [0, 0.0, -0.1, float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_and_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale=.* must be finite and positive"):
        find_batch_norms(residual_net(), scale)
    with pytest.raises(ValueError, match=r"scale\['bn1'\]=.* must be finite and positive"):
        find_batch_norms(residual_net(), {"bn1": scale})


@pytest.mark.parametrize("scale", ["big", "", None, True, [0.1]])
def test_a_scale_that_is_no_number_is_refused(scale: Any) -> None:
    with pytest.raises(TypeError, match="scale must be a number above 0"):
        find_batch_norms(residual_net(), scale)


def test_an_empty_scale_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="scale is an empty mapping"):
        find_batch_norms(residual_net(), {})


def test_a_scale_above_one_warns_and_a_scale_of_one_writes_nothing() -> None:
    with pytest.warns(UserWarning, match="the method starts batch norm scales below 1"):
        find_batch_norms(residual_net(), 2)
    records = find_batch_norms(residual_net(), 1.0, zero_scale="overwrite", trained="overwrite")
    assert {(record.verdict, record.reason) for record in records} == {("skip", "scale=1 writes nothing")}


@pytest.mark.parametrize("options", [{"zero_scale": "drop"}, {"trained": True}])
def test_an_unknown_policy_is_refused_with_the_choices(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is unknown: choose from 'keep', 'overwrite'"):
        find_batch_norms(residual_net(), **options)


def test_a_pattern_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="include takes name patterns such as"):
        find_batch_norms(residual_net(), include=[1])  # type: ignore[list-item]


def test_a_layer_used_twice_and_a_scale_of_two_layers_are_listed_once() -> None:
    layer, twin = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    twin.weight = layer.weight
    model = nn.ModuleDict({"first": layer, "again": layer, "twin": twin})
    assert verdicts(model) == {"first": FRESH}


def test_a_scale_shared_with_another_module_is_refused_and_both_are_named() -> None:
    model = nn.ModuleDict({"bn": nn.BatchNorm1d(4), "norm": nn.LayerNorm(4)})
    model["norm"].weight = model["bn"].weight
    (record,) = find_batch_norms(model)
    assert (record.verdict, record.state) == ("refuse", "shared")
    assert record.name == "bn"
    assert "'norm.weight'" in record.reason


def test_lazy_layers_are_to_be_rewritten_and_meta_layers_refused_until_they_have_values() -> None:
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    assert verdicts(lazy) == {"0": ("rewrite", "lazy")}
    assert find_batch_norms(lazy)[0].channels == 0
    lazy(torch.randn(2, 3, 4, 4))
    lazy[0].reset_running_stats()
    assert verdicts(lazy) == {"0": FRESH}
    with torch.device("meta"):
        assert verdicts(residual_net()) == dict.fromkeys(BATCH_NORMS, ("refuse", "unmaterialized"))


class OneWay(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


def test_a_parametrised_scale_is_judged_by_the_value_it_gives() -> None:
    model = residual_net()
    register_parametrization(model.bn1, "weight", Softplus())
    record = find_batch_norms(model)[1]
    assert (record.verdict, record.state) == FRESH
    assert record.scale is model.bn1.parametrizations.weight.original
    assert record.values is not None
    torch.testing.assert_close(record.values, torch.ones(6))


def test_a_parametrised_scale_that_cannot_be_set_is_refused() -> None:
    model = residual_net()
    register_parametrization(model.bn1, "weight", OneWay())
    record = find_batch_norms(model)[1]
    assert (record.verdict, record.state) == ("refuse", "unsupported")
    assert "parametrised by OneWay, which has no right_inverse" in record.reason


def test_a_parametrised_scale_made_from_several_parameters_is_refused() -> None:
    model = residual_net()
    nn.utils.parametrizations.weight_norm(model.bn1, dim=None)
    record = find_batch_norms(model)[1]
    assert (record.verdict, record.state) == ("refuse", "unsupported")
    assert "made from several parameters" in record.reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao moves to another package
def test_a_quantised_layer_is_refused_and_one_in_quantisation_aware_training_is_rewritten() -> None:
    qat = torch.ao.nn.intrinsic.qat.ConvBn2d(3, 4, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig())
    nn.init.ones_(qat.bn.weight)  # as converted from a float model; made anew it is random
    model = nn.ModuleDict({"int8": torch.ao.nn.quantized.BatchNorm2d(4), "qat": qat})
    assert verdicts(model) == {"int8": ("refuse", "unsupported"), "qat.bn": FRESH}


@pytest.mark.parametrize(
    "layer", [torchvision.ops.FrozenBatchNorm2d(5), timm.layers.FrozenBatchNormAct2d(5)], ids=["torchvision", "timm"]
)
def test_frozen_batch_norm_is_named_and_skipped(layer: nn.Module) -> None:
    (record,) = find_batch_norms(nn.Sequential(layer))
    assert (record.verdict, record.state, record.channels, record.scale) == ("skip", "frozen", 5, None)
    assert record.reason == "frozen: its scale is a buffer"


def test_the_auxiliary_layers_of_a_split_batch_norm_are_found_too() -> None:
    model = nn.Sequential(timm.layers.SplitBatchNorm2d(4, num_splits=3))
    assert verdicts(model) == {"0": FRESH, "0.aux_bn.0": FRESH, "0.aux_bn.1": FRESH}


def test_a_batch_norm_with_activation_is_found() -> None:
    assert verdicts(nn.Sequential(timm.layers.BatchNormAct2d(4))) == {"0": FRESH}


def test_policies_and_patterns_combine() -> None:
    model = nn.ModuleDict({"a": residual_net(zero_init_residual=True), "b": residual_net(zero_init_residual=True)})
    model["b"](torch.randn(4, 3, 6, 6))
    records = find_batch_norms(
        model, {"a.*": 0.2, "b.bn*": 0.3}, exclude=["*.stem.*"], zero_scale="overwrite", trained="overwrite"
    )
    assert {record.name: record.target for record in records if record.verdict == "rewrite"} == {
        "a.bn1": 0.2,
        "a.bn2": 0.2,
        "b.bn1": 0.3,
        "b.bn2": 0.3,
    }


def test_compiled_parts_have_the_names_that_they_have_where_nothing_is_compiled() -> None:
    eager = residual_net()
    names = list(verdicts(eager))
    part = residual_net()
    part.stem = torch.compile(part.stem)
    layer = residual_net()
    layer.bn1 = torch.compile(layer.bn1)
    for model in (torch.compile(eager), part, layer):
        assert list(verdicts(model)) == names
        assert all(model.get_submodule(record.name).weight is record.scale for record in find_batch_norms(model))
    assert list(verdicts(torch.compile(nn.BatchNorm2d(4)))) == [""]


def test_wrappers_of_checkpointing_leave_the_names_of_layers_alone() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = residual_net()
    model.stem = checkpoint_wrapper(model.stem)
    assert [record.name for record in find_batch_norms(model, include=["stem.1", "bn*"])] == BATCH_NORMS


def test_a_scale_that_fsdp_made_part_of_a_flat_parameter_is_refused() -> None:
    layer = nn.BatchNorm2d(3)
    del layer.weight
    layer.weight = torch.ones(3)  # a view of the flat parameter, as FSDP1 sets it with use_orig_params=False
    (record,) = find_batch_norms(layer)
    assert (record.verdict, record.state) == ("refuse", "unsupported")
    assert record.reason.endswith("wrap with use_orig_params=True, which is what FSDPStrategy does by itself")


def test_a_pruned_scale_is_refused_as_what_it_is() -> None:
    layer = nn.BatchNorm2d(3)
    prune.random_unstructured(layer, "weight", 1)
    (record,) = find_batch_norms(layer)
    assert (record.verdict, record.state) == ("refuse", "unsupported")
    assert record.reason.startswith(
        "its scale is not a parameter: a hook makes it from weight_orig, as torch.nn.utils.prune"
    )
    assert not is_flattened(layer)
    prune.remove(layer, "weight")
    assert find_batch_norms(layer)[0].state == "trained"


def test_a_layer_of_which_this_rank_holds_no_part_is_fresh_until_its_statistics_move() -> None:
    layer = nn.BatchNorm2d(3)
    layer.weight.data = layer.weight.data[:0]
    (record,) = find_batch_norms(layer)
    assert record.state == "fresh"
    assert record.has_scale(0.1)
    layer.running_mean.add_(1)
    assert find_batch_norms(layer)[0].state == "trained"
