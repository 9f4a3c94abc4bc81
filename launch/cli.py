"""How a verb ends: a user's mistake is a message and exit status 2, a bug is a traceback."""

import sys
from collections.abc import Callable


def run_verb(main: Callable[[], int | None]) -> None:
    """Run a verb's `main` and leave the process with its exit status.

    A `ValueError` is a mistake the user can mend: its message alone is printed, and the status
    is 2, as argparse's is. Ctrl-C leaves with 130, as shells expect. Everything else is ours.
    """
    try:
        status = main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
