"""Every optimizer of timm that a CPU can run: the rule equals groups made by hand, to the bit."""

from __future__ import annotations

import pytest
import timm.optim
import torch
from models import assert_same_parameters, residual_net, scales
from test_update_rule import LR, C, by_hand, train
from torch import nn

from lightning_revbn import ScaleUpdateRule

NEED_CUDA = ("bnb", "fused")  # bitsandbytes and apex
SECOND_ORDER = {"adahessian"}  # needs backward(create_graph=True)
NAMES = [n for n in timm.optim.list_optimizers() if not n.startswith(NEED_CUDA) and n not in SECOND_ORDER]


@pytest.mark.filterwarnings("ignore::UserWarning")  # deprecations inside some of them
@pytest.mark.parametrize("name", NAMES)
def test_the_rule_equals_groups_made_by_hand(name: str) -> None:
    def trained(model: nn.Module, with_rule: bool) -> nn.Module:
        groups = list(model.parameters()) if with_rule else by_hand(model, LR, 0.01)
        optimizer = timm.optim.create_optimizer_v2(groups, opt=name, lr=LR, weight_decay=0.01)
        torch.manual_seed(0)  # kron draws random numbers
        if with_rule:
            with ScaleUpdateRule(optimizer, scales(model), C, scales(model)):
                train(model, optimizer, steps=6)
        else:
            train(model, optimizer, steps=6)
        return model

    assert_same_parameters(trained(residual_net(), False), trained(residual_net(), True))


def test_most_of_timms_optimizers_are_tried() -> None:
    assert len(NAMES) > 80
