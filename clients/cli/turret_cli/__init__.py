"""The command `turret`."""

import os
import sys

INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that Ctrl-C ended


def run() -> None:
    """The entry point. Ctrl-C while the commands are imported ends it as quietly as afterwards."""
    # gRPC writes lines of its own when a connection fails: before the error of a command, and in no format of
    # the server's log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from turret_cli.main import main  # noqa: PLC0415
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    main()
