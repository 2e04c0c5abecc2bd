"""``unrolled bench --device cuda``: check the kernels on a GPU, then time them.

``parity`` compares kernels with the reference engine, and ``workers`` does so in several processes, which
also compile the kernels that are timed. ``checks`` contains what only a GPU shows, such as captured graphs.
``rows`` lists what is timed, ``contenders`` computes it, and ``clock`` times it. ``report`` prints the
results, and ``command`` runs all of that within a time limit.
"""
