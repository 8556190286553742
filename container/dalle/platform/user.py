"""A name and a home for a process of a user id without an entry in the passwd file. No torch.

torch asks for the user's name to name its caches, and Triton for the home directory to keep its
kernels. A container may run as any number, whose name and home nobody has set.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def name_user() -> None:
    """Set USER where the user has no name, and HOME where there is none to write to.

    A variable that is set and usable stays. The new home is a directory of this user alone under
    the temporary one. Call it before torch is imported.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            os.environ["USER"] = f"user-{os.getuid()}"
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or not os.access(home, os.W_OK | os.X_OK):
        with suppress(OSError):  # without a temporary directory that is writable
            os.environ["HOME"] = str(_own_directory())


def _own_directory() -> Path:
    """Return a directory that this user alone can write to. Raises OSError."""
    directory = Path(tempfile.gettempdir()) / f"home-of-user-{os.getuid()}"
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return directory
    return Path(tempfile.mkdtemp(prefix=f"{directory.name}-"))
