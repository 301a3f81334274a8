"""`turret serve`: the server. Its options are the settings of `turret_server.config`."""

from __future__ import annotations

import logging
import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from turret_cli.local import server_code

if TYPE_CHECKING:
    from turret_server.config import Setting


log = logging.getLogger(__name__)


class _SettingOption(click.Option):
    """A setting as an option: click splits the command line, the setting parses and checks the value."""

    def __init__(self, setting: Setting) -> None:
        default = f"  [default: {setting.default_text}]" if setting.default_text else ""
        super().__init__(
            [setting.flag, setting.name],
            metavar="[" + "|".join(setting.choices) + "]" if setting.choices else setting.metavar or None,
            is_flag=True if setting.kind is bool else None,
            multiple=setting.kind is tuple,
            help=setting.help + default,
        )
        self.group = str(setting.group)


class _ServeCommand(click.Command):
    """Makes its options when they are needed, so that no other command imports the server's settings."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from turret_server.config import SETTINGS  # noqa: PLC0415

        if len(self.params) == 1:  # --config
            self.params += [_SettingOption(setting) for setting in SETTINGS]
        return super().get_params(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = self.get_params(ctx)
        for title, group in groupby(options, key=_title):
            with formatter.section(title):
                formatter.write_dl([record for each in group if (record := each.get_help_record(ctx))])


def _title(option: click.Parameter) -> str:
    if isinstance(option, _SettingOption):
        return option.group
    return "Configuration" if option.name == "config" else "Other"


@click.command(
    cls=_ServeCommand,
    epilog="""\b
Examples:
  turret serve --model HuggingFaceTB/SmolLM2-135M-Instruct
  turret serve --model ./llama --adapters ./adapters --device cuda --memory 0.8
  turret serve --model ./llama --listen 0.0.0.0:50051 --tenants tenants.toml --metrics none
  turret serve --config server.toml
""",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="TURRET_CONFIG",
    show_envvar=True,
    metavar="FILE",
    help="TOML file of settings.",
)
def serve(*, config: Path | None, **flags: Any) -> None:
    """Serve a base model and its adapters until SIGINT or SIGTERM.

    Every setting can be given in three forms: --max-queue 64 on the command line, TURRET_MAX_QUEUE=64 in the
    environment, max_queue = 64 in the file of --config. The command line takes precedence over the
    environment, and the environment over the file. A repeatable option is a list in the file, and
    comma-separated in the environment.

    Exit status: 0 after SIGINT or SIGTERM, 1 when the server failed, 2 when a setting is wrong.
    """
    from turret_server import logs  # noqa: PLC0415
    from turret_server.app.signals import StopSignals  # noqa: PLC0415
    from turret_server.config import GivenSettings  # noqa: PLC0415

    source = click.get_current_context().get_parameter_source
    given = {name: value for name, value in flags.items() if source(name) is ParameterSource.COMMANDLINE}
    with server_code("server"):
        settings = GivenSettings(given, os.environ, config)
        validated = settings.config()
    signals = StopSignals()
    with signals.handled(), server_code("server"), settings.named_as_given():
        logs.set_up(validated.log_level, validated.log_format)
        log.info("starting: model %s, address %s", validated.model, validated.listen)
        from turret_server.app.run import serve as run  # noqa: PLC0415

        run(validated, signals)
