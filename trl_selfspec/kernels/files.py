"""Where kernels keep what they compiled and measured."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """The package's part of the user's cache, made if it is missing.

    Raises:
        OSError: it can't be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(base) / "trl_selfspec"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory
