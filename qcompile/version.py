"""The version, here and nowhere else: pyproject.toml, `qcompile --version`, reports and files read it."""

__version__ = "0.1.0"
