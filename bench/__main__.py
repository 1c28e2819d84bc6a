"""python -m bench COMMAND: one measurement a command; each knows --help."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "capture": "bench.capture",
}


def main(arguments: list[str]) -> int:
    """The exit code of the command that the first argument names."""
    if not arguments or arguments[0] not in COMMANDS:
        print(f"bench: expected one of {', '.join(COMMANDS)}, got {arguments[0] if arguments else 'nothing'}", file=sys.stderr)
        return 2
    return import_module(COMMANDS[arguments[0]]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
