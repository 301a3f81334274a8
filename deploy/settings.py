"""Writes the table of settings in README.md from `turret_server.config`: `make settings`."""  # noqa: INP001 -- a script

from itertools import groupby
from pathlib import Path

from turret_server.config import SETTINGS

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- settings: written by `make settings` -->\n", "<!-- end of settings -->"


def table() -> str:
    """One table for each group of `turret serve --help`."""
    lines = []
    for group, settings in groupby(SETTINGS, key=lambda setting: setting.group):
        lines += ["", f"**{group}**", "", "| setting | default | |", "|---|---|---|"]
        for setting in settings:
            value = " \\| ".join(setting.choices) or setting.metavar
            default = f"`{setting.default_text}`" if setting.default_text else ""
            lines.append(f"| `{setting.flag}` {value} | {default} | {setting.help} |".replace("  ", " "))
    return "\n".join([*lines, "", ""])


def with_table(text: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    if not (begin and END in rest):
        raise SystemExit(f"{README} has no markers {BEGIN.strip()} and {END}")
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
