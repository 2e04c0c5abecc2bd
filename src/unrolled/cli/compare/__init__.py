"""The command ``unrolled compare``: train cells on standard tasks with the same budget.

``base`` defines what a task is. ``synthetic`` and ``datasets`` contain the tasks, and ``tasks`` lists them.
``training`` finds the hidden size for a parameter budget and trains a cell with one seed. ``runs`` saves the
results in files, ``report`` and ``chart`` show them, and ``command`` parses the arguments.
"""
