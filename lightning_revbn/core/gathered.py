"""Gathers whole batch norm parameters where an engine leaves every rank a part of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_revbn.core.input_batch_norm import InputBatchNorm
from lightning_revbn.core.torch_compat import BatchNormBase

__all__ = ["gathered", "is_partitioned"]


@contextmanager
def gathered(model: nn.Module, *, write: bool = False, fsdp: bool = True) -> Generator[None]:
    """Let every rank see whole scales and shifts in a `with` block; all ranks must take part.

    It gathers parameters that FSDP1 has sharded or DeepSpeed's ZeRO-3 has partitioned. FSDP2 needs no such block, since
    its parameters gather themselves; for other models, the block does nothing.

    Args:
        model: The model, as FSDP has wrapped it.
        write: Whether to keep the values that the block writes.
        fsdp: Whether to gather parameters that FSDP1 has sharded. Set it to False until the whole model is wrapped,
            since FSDP takes the first gathered model for the root.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        partitioned = _partitioned(model)
        if partitioned:
            zero: Any = sys.modules["deepspeed"].zero  # imported already, as partitioned parameters prove
            stack.enter_context(zero.GatheredParameters(partitioned, modifier_rank=0 if write else None))
        wrapper = _fsdp_class()
        if fsdp and wrapper is not None:
            wrapped = wrapper.fsdp_modules(model)
            if wrapped:
                # On the host, so that an accelerator never holds several whole parts.
                offload = all(
                    part.compute_device.type != "cpu" and part.sharding_strategy.name != "NO_SHARD" for part in wrapped
                )
                with warnings.catch_warnings():  # every rank needs its own copy
                    warnings.filterwarnings("ignore", message="offload_to_cpu=True and rank0_only=False")
                    stack.enter_context(wrapper.summon_full_params(model, writeback=write, offload_to_cpu=offload))
        yield


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Tell whether DeepSpeed's ZeRO-3 has put a part of a parameter on every rank.

    Args:
        parameter: The parameter.

    Returns:
        True if so, whether or not it is gathered at the moment.
    """
    return hasattr(parameter, "ds_id")


# BatchNormMonitor gathers at every event, and a walk over a large model costs more than the statistics do.


def _partitioned(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of batch norm layers that ZeRO-3 has partitioned."""
    if "deepspeed" not in sys.modules:
        return []
    layers = (layer for layer in model.modules() if isinstance(layer, (BatchNormBase, InputBatchNorm)))
    return [parameter for layer in layers for parameter in layer.parameters() if is_partitioned(parameter)]


def _fsdp_class() -> Any:
    """Return FSDP1's wrapper class, or None where no model can be wrapped: not imported, or no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
