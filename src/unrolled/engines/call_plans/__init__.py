"""Call plans: calls of a module that are recorded once and then repeated with other tensors.

Around one step of a small cell, checks and preparation in Python take ten times as long as the kernel. A plan
is what remains of a call once its shapes are known: which kernels it launches, and which of their pointers
point to which tensor. It holds no tensor and nothing that is derived from the values of one, so parameters
are read anew in each call. Every call first checks that the situation is the one that was recorded; in any
other situation it runs as usual, with the usual results and errors.
"""
