"""`trl-selfspec COMMAND`. A command is a module with `add_parser` that sets `run`."""

import argparse
import sys
from collections.abc import Sequence

from trl_selfspec.cli import advise


COMMANDS = (advise,)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("trl-selfspec", description="Lossless speculative rollouts for TRL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:  # of the user's input, or a file that is not there
        print(f"trl-selfspec {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
