"""``python -m stillroom.exporting.apart [NAME ...]``: make environments ahead, for a machine that will be offline."""

import sys

from stillroom.errors import StillroomError
from stillroom.exporting.apart.process import environment, names


def main(wanted: list[str]) -> int:
    """Make those that are named, or all."""
    for name in wanted or names():
        try:
            print(environment(name).parent.parent)
        except StillroomError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
