"""The command ``unrolled compare``: cells trained on the same tasks with the same budget.

``task`` says what a task is, ``real`` has those on real data, ``catalogue`` all of them by name; ``training``
finds the size that a budget allows and trains a cell with one seed, ``runs`` keeps what came of it in files,
``report`` and ``picture`` show the results, and ``command`` reads the arguments and brings them together.
"""
