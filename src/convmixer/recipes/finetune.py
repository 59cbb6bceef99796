"""Train on the bundled digits: `convmixer train digits --recipe digits`."""

from convmixer.config import Config


def config() -> Config:
    """Return the settings."""
    return Config()
