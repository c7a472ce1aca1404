"""The version of loftq-cli, as in pyproject.toml. Results record the version."""

VERSION = "0.1.0"
