"""The command ``unrolled bench``: our layers beside other runtimes, and beside the machine's limits.

``grid`` says which rows, ``work`` makes what a row computes, ``peers``, ``graphs`` and ``scans`` are the
runtimes, ``timing`` times them in turn, ``limits`` measures the machine, ``apart`` what needs a process
of its own, ``report`` and ``picture`` show it, ``command`` ties them together.
"""
