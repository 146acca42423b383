"""Trains the digits network from Hydra configurations: `revbn=default` switches revisited batch norm on.

`python examples/hydra/train.py` trains the baseline, `python examples/hydra/train.py revbn=default revbn.scale=0.25`
the revisited network. `-m revbn=default revbn.scale=0.1,0.25 seed=1,2,3` trains a network for each combination. This
script has no code for revisited batch norm: `conf/revbn` adds it as an entry of `callbacks`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

sys.path.append(str(Path(__file__).parents[1]))  # where digits.py is

from digits import derive_seed, log_level, prepare_process


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> float:
    """Train a network.

    Args:
        config: Hydra's configuration from `conf/` and the command line.

    Returns:
        Accuracy on the validation images, by which Hydra's sweepers choose a scale.
    """
    prepare_process()
    L.seed_everything(derive_seed(config.seed), verbose=False)
    network, digits = instantiate(config.model), instantiate(config.data)
    callbacks = [instantiate(settings) for settings in config.callbacks.values() if "_target_" in settings]
    trainer: L.Trainer = instantiate(config.trainer, callbacks=callbacks)
    with log_level(logging.INFO):  # the callback's table is an INFO message
        trainer.fit(network, digits)
    accuracy = trainer.callback_metrics["val_acc"].item()
    print(f"Validation accuracy: {100 * accuracy:.2f} %, logged in {trainer.log_dir}")
    return accuracy


if __name__ == "__main__":
    main()
