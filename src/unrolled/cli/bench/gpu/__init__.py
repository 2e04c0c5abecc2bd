"""``unrolled bench --device cuda``: check the kernels on a GPU, then time them.

``parity`` compares kernels with the reference engine. ``workers`` runs the comparisons in several processes,
which also compile the kernels that are timed. ``checks`` contains checks that need a GPU, such as captured
graphs. ``rows`` lists the rows to time, ``contenders`` runs them, and ``clock`` times them. ``report`` prints
the results, and ``command`` runs everything within a time limit.
"""
