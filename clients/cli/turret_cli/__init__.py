"""The command `turret`."""

import os
import sys

INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that Ctrl-C ended


def run() -> None:
    """The entry point. Ctrl-C while the commands are imported ends it as quietly as afterwards."""
    if sys.argv[1:2] != ["serve"]:
        # Of a connection that fails gRPC writes lines of its own, before the error of the command.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        from turret_cli.main import main  # noqa: PLC0415
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    main()
