"""The console command `mm-convert`: <Converter> <method> --cfg.a.b value, YAML by --config, the environment.

jsonargparse reads the grammar off the converters' signatures. Errors are one message and exit code 2.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

DESCRIPTION = "Weights between the hub's layout and Megatron-style trees or DCP directories."


def words(given: Sequence[str]) -> list[str]:
    """The command line with `--dry-run` for `--dry_run`, and a switch without a value as `true`."""
    out: list[str] = []
    switches = ("--verify", "--dry_run", "--allow_pickle")
    for at, word in enumerate(given):
        name, equals, value = word.partition("=")
        if re.fullmatch(r"--[a-z][\w.-]*", name):
            name = "--" + name[2:].replace("-", "_")
        if name.startswith("--no_") and f"--{name[5:]}" in switches:
            out += [f"--{name[5:]}", "false"]
            continue
        out.append(name + equals + value)
        following = given[at + 1] if at + 1 < len(given) else "--"
        if (
            name in switches
            and not equals
            and (following.startswith("-") or not re.fullmatch("(?i)true|false|yes|no|1|0", following))
        ):
            out.append("true")
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point."""
    from polymodal.core.search_path import leave_working_directory

    leave_working_directory()
    import jsonargparse

    from polymodal.convert.converters import CONVERTERS
    from polymodal.core import terminal
    from polymodal.core.errors import PolymodalError

    if arguments is None:
        terminal.start()
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    given = words(sys.argv[1:] if arguments is None else arguments)
    # the parser of one converter is made faster than that of all
    offered = {name: CONVERTERS[name] for name in given[:1] if name in CONVERTERS} or CONVERTERS
    try:
        jsonargparse.auto_cli(
            offered, args=given, as_positional=False, prog="mm-convert", description=DESCRIPTION
        )
    except PolymodalError as error:
        terminal.report(error)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
