"""Tests, in folders as the code has them. A package, so that forked processes find it before the
`tests` that clip-anytorch installs."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
