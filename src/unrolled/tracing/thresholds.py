"""The limits above or below which :meth:`unrolled.Trace.health` reports a problem, each with its reason."""

from __future__ import annotations

KINDS = {
    "not finite": "the first NaN or infinity, and what it came from",
    "gradient not finite": "the first NaN or infinity in a gradient",
    "gate shut": "a gate that lets nothing through",
    "gate open": "a gate that lets everything through",
    "saturated": "units whose function is at its flat end",
    "dead": "units that never change",
    "growing state": "a state that grows exponentially",
    "gradient explodes": "a gradient that grows exponentially, backward through time",
    "gradient vanishes": "a gradient that is gone some steps back",
    "no gradient": "a layer that the loss doesn't depend on",
    "ignores input": "a layer that the input doesn't influence",
    "ignores past": "a layer that the previous state doesn't influence",
    "zero weights": "weights that are all zero",
    "unused parameter": "weights and biases without any effect",
}
"""Every kind of finding, with its meaning."""

FLAT_SLOPE = 0.05
"""A function is saturated where its slope is below this fraction of its maximum.

For a sigmoid, these are values below 0.0127 or above 0.9873; for tanh, those beyond ±0.9747. There, gradients
through the function shrink to a twentieth or less. :func:`unrolled.watch` uses the same limit for
``saturated``.
"""

STUCK_GATE = 0.99
"""A gate is stuck if this share of its values is at one end, over all steps and rows.

Units that switch are healthy, even if they do so rarely. One value in a hundred is left for the first steps,
when the state is still that before the sequence.
"""

SATURATED_UNIT = 0.95
"""A unit is saturated if this share of its values is at a flat end of its function, over all steps and rows.

A gradient then passes at one step in twenty, so it is lost after a few steps.
"""

OPEN_GATE = 0.999
"""A gate is stuck open if it stays above this value.

A gate that is merely open is how a layer remembers: at 0.99, half of a cell state is left after 69 steps.
Above 0.999, the slope of the sigmoid is below 0.4 % of its maximum, so the gate can't learn to shut. For a
gate ``z`` that also occurs as ``1 − z``, the limit is that of a shut gate, because it shuts what ``1 − z``
multiplies.
"""

DEAD_CHANGE = 8
"""A unit is dead if it changes by at most this many rounding errors over all steps and rows.

The same number, computed at another step or in another row, can differ by a few rounding errors.
"""

DEAD_AT_ZERO = 64
"""A unit that is always 0 is dead only if there are this many steps, all rows together.

A unit of a relu may be 0 at many steps in a row and still be active for other inputs. In dtypes with less
precision than float32, this holds for all numbers, because they are often the same by chance.
"""

STATE_GROWTH = 20.0
"""A state grows if its norm increases by this factor from the first step to the last.

Below this factor, there is no harm yet, and in a few steps growth can't be told from the start of a sequence.
"""

EXPONENTIAL_GROWTH = 4.0
"""Growth is exponential if the median growth per step of the second half makes up this factor over that half.

The norm of a sum doubles in the second half if the same is added at every step. It grows fourfold if what is
added grows with the steps. The median leaves out single jumps, such as an input that starts late.
"""

EXPLODING_GRADIENT = 100.0
"""A gradient explodes if it grows by this factor times the number of steps, backward through the sequence.

A loss that depends on all steps adds to the gradient at every step, so that it grows like the number of
steps. The median growth per step must make up this factor, too, since the loss may be much larger at single
steps.
"""

VANISHING_GRADIENT = 1e-4
"""A gradient is gone at the steps where it is below this share of its largest norm at later steps.

The gradient of a weight is the sum over all steps. A thousand such steps add up to a tenth of one step at
most, which is below the noise between batches.
"""

IGNORED_VARIANCE = 1e-6
"""A layer ignores its input, or its past, if it explains less than this share of the variance.

The share of the new states' variance is the total Sobol index: the input of each step is replaced by that of
another step, and the states stay as they are. The limit is 0.1 % of the standard deviation. A layer that
averages its last T inputs, if these are random, has an index of about 1/T. The slowest published cell has one
of 2e-5 when it begins to train.
"""

MAIN_CAUSE = 0.5
"""A bias or a weighted sum is the cause of a stuck gate if it makes up this share of the pre-activation."""

MINIMUM_BIAS = 3.0
"""The smallest size of a bias that is named as the cause of a stuck gate. sigmoid(−3) is 0.047."""

SAMPLES = 512
"""The maximum number of steps, all rows together, whose inputs, states and parameters are replaced.

They run at once as one batch. The share of the variance is then known to about 6 %.
"""

RECORDED_NUMBERS = 20_000_000
"""The maximum of numbers that :meth:`unrolled.Watch.health` records of a call.

They take 80 MB in float32. Of a larger call, it uses the first rows, and those with NaN or infinity in the
output.
"""
