"""The command `turret`."""

import os
import sys

INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that Ctrl-C ended


def run() -> None:
    """The entry point. Ctrl-C while the commands are imported ends it as quietly as afterwards."""
    # gRPC logs failed connections itself: before the error message of a command, and not in the server's log
    # format.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from turret_cli.main import main  # noqa: PLC0415
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    main()
