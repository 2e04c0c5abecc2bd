"""Hides the package of this name in processes whose PYTHONPATH contains this folder."""
