"""cakd: distil a large image classifier into a small one."""

__version__ = "0.1.0"
