"""The process that looks into files of pickles: no network, no other files, little memory, and nothing of megalm's.

Owns what this process gives up before it reads the first byte, and its protocol: ranges of open files come as
arguments, one line of JSON a range goes out. It runs as `python -I -S`, with an empty environment, and imports the
standard library and its two neighbours alone. It calls nothing that a file names; if it did, it could do nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from typing import Any

from megalm.models.foreign.archive import contents_of
from megalm.models.foreign.opcodes import Refused

MEMORY_BYTES = 3 << 30
SECONDS = 300
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # of unshare(2); Python has it from 3.12 on
_NO_NEW_PRIVILEGES = 38  # of prctl(2)


def confine() -> str:
    """Give up all but reading the files that are open and writing to standard output; return what was not possible."""
    left = []
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_NEW_USER | _NEW_NETWORK) != 0 and library.unshare(_NEW_NETWORK) != 0:
        left.append(f"no network namespace ({os.strerror(ctypes.get_errno())})")
    if library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        left.append("privileges stay")
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),  # pipes have no size
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_NOFILE, 0),  # no file and no socket more; those that are open stay so
    ):
        try:
            resource.setrlimit(limit, (most, most))
        except (OSError, ValueError):
            left.append(f"limit {limit} stays")
    return ", ".join(left)


def answer(request: list[Any]) -> str:
    """Return the line for one request [descriptor, first byte, bytes, whether the pickle stands alone]."""
    descriptor, first, size, alone = request
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return json.dumps({"contents": contents_of(file, first, size, alone)}, separators=(",", ":"))
    except Refused as error:
        return json.dumps({"refused": str(error)})
    except (MemoryError, RecursionError) as error:
        return json.dumps({"refused": f"takes more memory than any checkpoint needs ({type(error).__name__})"})


def main() -> None:
    """Answer the requests of the command line."""
    requests = json.loads(sys.argv[1])
    print(json.dumps({"left": confine()}))
    for request in requests:
        print(answer(request))
