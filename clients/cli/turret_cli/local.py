"""What the commands share that run the server's own code in this process: `serve`, `validate` and `convert`.

The server's packages are imported only inside the commands: the others, and --help, also work and start fast
where only the client's dependencies are installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from turret_cli.common import FailureError, WrongUsageError

if TYPE_CHECKING:
    from turret_adapters.host import HostAdapter
    from turret_adapters.spec import BaseSpec

model_option = click.option(
    "--model", required=True, metavar="PATH_OR_HUB_ID", help="Base model of the adapter."
)


@contextmanager
def server_code(extra: str) -> Iterator[None]:
    """Turns the errors of the server's packages into errors of the command line.

    Raises:
        WrongUsageError: a setting of the server is wrong.
        FailureError: another error with a reason, or a dependency is not installed; `extra` brings it.
    """
    from turret_adapters.errors import AdapterError  # noqa: PLC0415
    from turret_server.errors import ConfigError, TurretError  # noqa: PLC0415

    try:
        yield
    except ConfigError as error:
        raise WrongUsageError(str(error), error.reason) from error
    except (AdapterError, TurretError) as error:
        raise FailureError(str(error), error.reason) from error
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("turret"):
            raise
        raise FailureError(
            f"{error.name} is not installed; in Turret's source folder, install it with: "
            f'pip install ".[{extra}]"'
        ) from error


def read_adapter(path: Path, model: str, base: BaseSpec) -> HostAdapter:
    """The adapter in the folder, validated against the base model."""
    from turret_adapters.formats import peft  # noqa: PLC0415
    from turret_adapters.formats.files import resolve  # noqa: PLC0415
    from turret_adapters.formats.labels import read_labels  # noqa: PLC0415
    from turret_server.model.describe import CheckpointWeights  # noqa: PLC0415
    from turret_server.model.load import read_tokenizer  # noqa: PLC0415

    weights, folder = CheckpointWeights(model, base), resolve(str(path))
    tokenizer = read_tokenizer(model).changes(folder)
    return peft.read_adapter(path, base, weights, tokenizer=tokenizer, labels=read_labels(folder))


def format_range(values: Iterable[int]) -> str:
    numbers = sorted(values)
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
