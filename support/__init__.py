"""What the paper takes for granted. A script imports it before anything that takes long."""

import os
import re
import signal
import sys

GOES_ON = "interrupted; the same command goes on from here, 03 and 04 with --resume"


def leave(number, frame) -> None:
    """Ends a program by Ctrl-C while it imports, where an exception could get lost in C code."""
    os.write(2, f"{GOES_ON}\n".encode())
    os._exit(128 + number)


if re.match(r"0\d_\w+\.py$", os.path.basename(sys.argv[0])):  # not where a test or notebook imports
    signal.signal(signal.SIGINT, leave)
