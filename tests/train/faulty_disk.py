"""`megalm train` on a disk that fails one rank: python -m tests.train.faulty_disk FAULT RANK FIRST LAST ARGUMENTS...

FAULT meets the rank where it makes files of the checkpoints of the steps FIRST .. LAST: the name of an error such as
ENOSPC, or "hang". Tries follow each other at once.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from pathlib import Path

from megalm.checkpoint import background
from megalm.checkpoint.files import FileSystem


def plant(fault: str, first: int, last: int) -> None:
    """Have this process's checkpoints of some steps fail."""
    original = FileSystem.create

    def create(self: FileSystem, path: Path) -> int:
        step = re.search(r"step-(\d+)", path.parent.name)
        if step and first <= int(step[1]) <= last:
            if fault == "hang":
                time.sleep(3600)
            code = getattr(errno, fault)
            raise OSError(code, os.strerror(code), str(path))
        return original(self, path)

    FileSystem.create = create  # type: ignore[method-assign]


if __name__ == "__main__":
    from megalm.cli import main

    background.try_to_save.__defaults__ = ((0.05, 0.05, 0.05), True)
    if os.environ.get("RANK", "0") == sys.argv[2]:
        plant(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]))
    sys.exit(main(["train", *sys.argv[5:]]))
