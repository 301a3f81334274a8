"""The command `turret`."""

import sys

INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that Ctrl-C ended


def run() -> None:
    """The entry point. Ctrl-C while the commands are imported ends it as quietly as afterwards."""
    try:
        from turret_cli.main import main  # noqa: PLC0415
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    main()
