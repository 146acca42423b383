"""Trains the digits network from Hydra configurations: `revbn=default` switches revisited batch norm on.

`python examples/hydra/train.py` trains the baseline, `python examples/hydra/train.py revbn=default revbn.scale=0.25`
the revisited network. `-m revbn=off,default 'seed=range(1,6)'` is a study: a network for each combination, each in a
directory of its own below `multirun`. `hydra/launcher=joblib` trains them side by side, `hydra/launcher=submitit_slurm`
on a cluster. A study that is started again trains only missing runs, and `lightning-revbn compare multirun --metric
test_acc` compares its arms. This script has no code for revisited batch norm: `conf/revbn` adds it as an entry of
`callbacks`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from study import Scores, record_failure, train_once

# study.py and digits.py are here. The processes of a launcher import them too, and inherit only the environment.
FOLDERS = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])


def train(config: DictConfig) -> Scores:
    """Train a network and test it.

    Args:
        config: Hydra's configuration from `conf/` and the command line.

    Returns:
        Accuracy on the validation images and on the test images.
    """
    sys.path.extend(FOLDERS)  # workers of a Ray cluster do not inherit the environment either
    # Imported here, because a finished run is passed over in a second without Lightning, and in five with it.
    import logging

    import lightning as L
    from digits import derive_seed, log_level, prepare_process

    prepare_process()
    L.seed_everything(derive_seed(config.seed), verbose=False)
    network, digits = instantiate(config.model), instantiate(config.data)
    callbacks = [instantiate(settings) for settings in config.callbacks.values() if "_target_" in settings]
    trainer: L.Trainer = instantiate(config.trainer, callbacks=callbacks)
    with log_level(logging.INFO):  # the callback's table is an INFO message
        trainer.fit(network, digits)
    accuracy = trainer.callback_metrics["val_acc"].item()
    print(f"Validation accuracy: {100 * accuracy:.2f} %, logged in {trainer.log_dir}")
    (tested,) = trainer.test(network, digits, verbose=False)
    return {"val_acc": accuracy, "test_acc": tested["test_acc"]}


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> float:
    """Train a run of a study, unless it is finished.

    Args:
        config: Hydra's configuration from `conf/` and the command line.

    Returns:
        Accuracy on the validation images, by which Hydra's sweepers choose a scale; NaN for a failed run.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return train_once(folder, config, train)["val_acc"]
    except Exception as error:
        if HydraConfig.get().mode is not RunMode.MULTIRUN:
            raise
        # Raised here, the error would end the study after this batch of runs. The report at the end names it.
        record_failure(folder, error)
        return float("nan")


if __name__ == "__main__":
    main()
