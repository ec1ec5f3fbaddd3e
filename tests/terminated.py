"""One life of the run of killed.py, in a process that is no fork: prints what comes of it, as JSON.

    python tests/terminated.py [FOLDER]

When it has read 20 of its 45 batches it says so, and waits for a line, or the end, of its standard
input: the moment to send SIGTERM.
"""

import itertools
import json
import sys
from pathlib import Path

from killed import life

count = itertools.count(1)


def read():
    if next(count) == 20:
        print("reading", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    print(json.dumps(life(Path(sys.argv[1]) if len(sys.argv) > 1 else None, read)))
