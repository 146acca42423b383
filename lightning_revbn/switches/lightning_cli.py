"""The flag for LightningCLI: `--revbn.enabled true`, and a setting for every argument of the callback."""

# pyright: reportUnknownMemberType=false
# jsonargparse is only partly typed.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_revbn.callbacks.revisited import RevisitedBatchNorm
from lightning_revbn.lightning_compat import twins

__all__ = ["RevBNCLI", "RevBNCLIMixin"]

if TYPE_CHECKING:
    _Base = LightningCLI
else:
    _Base = object

_GROUP = "revbn"


class RevBNCLIMixin(_Base):
    """Adds the group `revbn` to a LightningCLI of either Lightning package; the mixin comes first among the bases.

    The group has every argument of `RevisitedBatchNorm`, as `--revbn.scale 0.25` or in a configuration file. Only the
    default of `enabled` differs: it is False, and then the Trainer is the same as without the group. The settings are
    checked before the model is made, and saved with the rest of the configuration.

    Raises:
        TypeError: When a class is defined, if the mixin comes after `LightningCLI`.
        ModuleNotFoundError: If jsonargparse is not installed.

    Example::

        class MyCLI(RevBNCLIMixin, pytorch_lightning.cli.LightningCLI):
            ...
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not {*twins(LightningCLI)}.isdisjoint(cls.__mro__[: cls.__mro__.index(RevBNCLIMixin)]):
            raise TypeError(
                f"{cls.__name__}: RevBNCLIMixin must come before LightningCLI among the bases, or its group is never "
                f"added: class {cls.__name__}(RevBNCLIMixin, LightningCLI)"
            )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser; overrides Lightning's method.

        Args:
            **kwargs: Arguments of the parser.

        Returns:
            The parser.

        Raises:
            ModuleNotFoundError: If jsonargparse is not installed.
        """
        try:
            return super().init_parser(**kwargs)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'{type(self).__name__} needs jsonargparse: pip install "lightning-revbn[lightning-cli]"'
            ) from error

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the group beside the groups of Trainer, model and data; overrides Lightning's method.

        Args:
            parser: The parser of a subcommand.
        """
        super().add_core_arguments_to_parser(parser)
        self._revbn_parsers = [*getattr(self, "_revbn_parsers", []), parser]
        _add_group(parser)
        parser.set_defaults({f"{_GROUP}.enabled": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and end the program with an error if a setting of the callback is wrong; overrides Lightning's method.

        Args:
            parser: The parser.
            args: The arguments to parse; None parses the command line.
        """
        super().parse_arguments(parser, args)
        settings = self._of(self.config, _GROUP)
        if not settings["enabled"]:
            return
        # A separate parser checks the group alone, so no model and no data are made for a run that cannot start.
        checking = LightningArgumentParser(exit_on_error=False)
        _add_group(checking)
        try:
            checked = checking.instantiate_classes(checking.parse_object({_GROUP: settings.as_dict()}))
            RevisitedBatchNorm(**checked[_GROUP])
        except (TypeError, ValueError) as error:
            parser.error(f"{_GROUP}: {error}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, with the callback if it is enabled; overrides Lightning's method.

        Args:
            **kwargs: Arguments that take precedence over the configuration.

        Returns:
            The Trainer.
        """
        settings = self._of(self.config_init, _GROUP)
        if settings["enabled"]:
            own = _as_list({**self._of(self.config_init, "trainer"), **kwargs}.get("callbacks"))
            # All subcommands have the same groups of callbacks.
            grouped = [self._of(self.config_init, key) for key in self._revbn_parsers[0].callback_keys]
            # Lightning would refuse a second callback for its equal key in checkpoints, without naming the flag.
            if any(
                isinstance(callback, RevisitedBatchNorm)
                for callback in [*own, *grouped, *_as_list(self.trainer_defaults.get("callbacks"))]
            ):
                self.parser.error(
                    f"two callbacks: {_GROUP}.enabled is true, and the Trainer has a RevisitedBatchNorm of its own, "
                    f"from trainer.callbacks or the program. Set {_GROUP}.enabled to false, or remove the other "
                    "callback"
                )
            kwargs["callbacks"] = [*own, RevisitedBatchNorm(**settings)]
        return super().instantiate_trainer(**kwargs)

    def _of(self, config: Any, key: str) -> Any:
        return config.get(str(config.get("subcommand")), config)[key]


class RevBNCLI(RevBNCLIMixin, LightningCLI):
    """LightningCLI with the group `revbn`, which switches `RevisitedBatchNorm` on and takes its settings.

    Example::

        RevBNCLI(MyModel, MyData)  # python train.py fit --revbn.enabled true --revbn.scale 0.25
    """


def _add_group(parser: LightningArgumentParser) -> None:
    # Not instantiated: without `enabled`, no callback is made.
    parser.add_class_arguments(RevisitedBatchNorm, _GROUP, instantiate=False, sub_configs=True)


def _as_list(callbacks: Any) -> list[Any]:
    if callbacks is None:
        return []
    return [*cast("list[Any]", callbacks)] if isinstance(callbacks, (list, tuple)) else [callbacks]
