"""The version of megalm, in the one place from which the packaging and the command line read it."""

__version__ = "0.1.0"
