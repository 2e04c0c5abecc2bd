"""The command ``unrolled bench``: time our layers against other runtimes and the limits of the machine.

``rows`` defines the rows of the benchmark and ``workload`` the computation of a row. ``runtimes``,
``onnx_runtimes`` and ``jax_runtime`` run it. ``timing`` times several runtimes in turn, and ``measure``
checks and times one row; ``disturbance`` says when not to trust it. ``limits`` measures the machine, and
``in_subprocess`` what needs a fresh process. ``results`` is the JSON document, ``report`` and ``chart``
show it, and ``command`` parses the arguments.
"""
