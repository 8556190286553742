"""A package, so that forked processes find it before the `tests` that clip-anytorch installs."""
