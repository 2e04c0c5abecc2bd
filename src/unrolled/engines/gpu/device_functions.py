"""Functions that GPU kernels call, in Triton. A kernel's source contains those that it needs.

They use only what Triton's interpreter can run, so the sources of kernels can be tested without a GPU. They
hold for float32 and float64. The rational approximations are those of the Cephes library.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    a = tl.abs(x)
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, x + x * z * (p / q), tl.where(x < 0, -large, large))


@triton.jit
def expm1(x):
    z = x * x
    p = (1.2617719307481059087798e-4 * z + 3.0299440770744196129956e-2) * z + 9.9999999999999999999102e-1
    q = (3.0019850513866445504159e-6 * z + 2.5244834034968410419224e-3) * z + 2.2726554820815502876593e-1
    q = q * z + 2.0
    p = x * p
    return tl.where(tl.abs(x) < 0.5, 2.0 * (p / (q - p)), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    u = 1.0 + x
    is_small = u == 1.0
    correction = tl.where(is_small | (u == float("inf")), 1.0, x / tl.where(is_small, 1.0, u - 1.0))
    return tl.where(is_small, x, tl.log(u) * correction)


@triton.jit
def log10(x):
    return tl.log(x) * 0.43429448190325182765


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def is_negative(x):
    return (x < 0) | ((x == 0) & (1.0 / x < 0))


@triton.jit
def copysign(x, y):
    a = tl.abs(x)
    return tl.where(is_negative(y), -a, a)


@triton.jit
def maximum(x, y):
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def minimum(x, y):
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def fmax(x, y):
    return tl.where(x != x, y, tl.where(y != y, x, maximum(x, y)))


@triton.jit
def fmin(x, y):
    return tl.where(x != x, y, tl.where(y != y, x, minimum(x, y)))


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def row_maximum(x):
    nans = tl.max((x != x).to(tl.int32), 1, keep_dims=True)
    return tl.where(nans > 0, float("nan"), tl.max(x, 1, keep_dims=True))


@triton.jit
def row_minimum(x):
    nans = tl.max((x != x).to(tl.int32), 1, keep_dims=True)
    return tl.where(nans > 0, float("nan"), tl.min(x, 1, keep_dims=True))


@triton.jit
def trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_half_even(x):
    below = tl.floor(x)
    rest = x - below
    is_odd = tl.floor(below * 0.5) != below * 0.5
    return tl.where((rest > 0.5) | ((rest == 0.5) & is_odd), below + 1.0, below)


@triton.jit
def fmod(x, y):
    a = tl.abs(x)
    b = tl.abs(y)
    rest = tl.fma(-b, tl.floor(a / b), a)
    rest = tl.where(rest < 0, rest + b, tl.where(rest >= b, rest - b, rest))
    rest = tl.where((b == float("inf")) & (a < b), a, rest)
    return tl.where(x < 0, -rest, rest)


@triton.jit
def remainder(x, y):
    rest = fmod(x, y)
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
def power(x, y):
    a = tl.abs(x)
    size = tl.where(a == 1.0, 1.0, tl.exp(y * tl.log(a)))
    is_whole = tl.floor(y) == y
    is_odd = is_whole & (tl.floor(y * 0.5) != y * 0.5)
    result = tl.where(is_odd & is_negative(x), -size, size)
    result = tl.where((x < 0) & (a != float("inf")) & (is_whole == 0), float("nan"), result)
    return tl.where((y == 0) | (x == 1.0), 1.0, result)


@triton.jit
def hypot(x, y):
    a = tl.maximum(tl.abs(x), tl.abs(y))
    b = tl.minimum(tl.abs(x), tl.abs(y))
    ratio = tl.where((a == 0) | (a == float("inf")), 0.0, b / a)
    result = a * tl.sqrt(1.0 + ratio * ratio)
    return tl.where((x != x) | (y != y), tl.where(a == float("inf"), a, x + y), result)


@triton.jit
def tan(x):
    return tl.sin(x) / tl.cos(x)


@triton.jit
def atan(x):
    a = tl.abs(x)
    is_large = a > 2.41421356237309504880
    is_medium = (a > 0.66) & (a <= 2.41421356237309504880)
    u = tl.where(is_large, -1.0 / a, tl.where(is_medium, (a - 1.0) / (a + 1.0), a))
    quarters = 2.0 * is_large.to(x.dtype) + is_medium.to(x.dtype)
    z = u * u
    p = (-8.750608600031904122785e-1 * z - 1.615753718733365076637e1) * z - 7.500855792314704667340e1
    p = (p * z - 1.228866684490136173410e2) * z - 6.485021904942025371773e1
    q = (z + 2.485846490142306297962e1) * z + 1.650270098316988542046e2
    q = ((q * z + 4.328810604912902668951e2) * z + 4.853903996359136964868e2) * z + 1.945506571482613964425e2
    result = quarters * 0.78539816339744830962 + (u + u * z * (p / q))
    return tl.where(x < 0, -result, result)


@triton.jit
def atan2(y, x):
    a = tl.abs(y)
    b = tl.abs(x)
    are_equal = (a == b) & ((a == 0) | (a == float("inf")))
    result = atan(tl.where(are_equal, (a != 0).to(y.dtype), a / b))
    result = tl.where(is_negative(x), 3.14159265358979323846 - result, result)
    return tl.where(is_negative(y), -result, result)


@triton.jit
def asin(x):
    return atan(x / tl.sqrt((1.0 - x) * (1.0 + x)))


@triton.jit
def acos(x):
    return 2.0 * atan(tl.sqrt((1.0 - x) / (1.0 + x)))


@triton.jit
def sinh(x):
    a = tl.abs(x)
    m = expm1(tl.minimum(a, 1.0))
    half = tl.exp(0.5 * a)
    result = tl.where(a < 1.0, 0.5 * (m + m / (m + 1.0)), (0.5 * half) * half - 0.5 / half / half)
    result = tl.where(x != x, x, result)
    return tl.where(x < 0, -result, result)


@triton.jit
def cosh(x):
    half = tl.exp(0.5 * tl.abs(x))
    return (0.5 * half) * half + 0.5 / half / half


@triton.jit
def asinh(x):
    a = tl.abs(x)
    is_large = a > 1.0e8
    b = tl.where(is_large, 1.0, a)
    result = log1p(b + b * b / (1.0 + tl.sqrt(b * b + 1.0)))
    result = tl.where(is_large, tl.log(a) + 0.69314718055994530942, result)
    return tl.where(x < 0, -result, result)


@triton.jit
def acosh(x):
    t = x - 1.0
    is_large = x > 1.0e8
    u = tl.where(is_large, 1.0, t)
    result = log1p(u + tl.sqrt(2.0 * u + u * u))
    result = tl.where(is_large, tl.log(x) + 0.69314718055994530942, result)
    return tl.where(x < 1.0, float("nan"), result)


@triton.jit
def atanh(x):
    a = tl.abs(x)
    result = 0.5 * log1p(2.0 * a / (1.0 - a))
    return tl.where(x < 0, -result, result)


@triton.jit
def erfc(x):
    a = tl.abs(x)
    p = 2.46196981473530512524e-10 * a + 5.64189564831068821977e-1
    p = (p * a + 7.46321056442269912687e0) * a + 4.86371970985681366614e1
    p = (p * a + 1.96520832956077098242e2) * a + 5.26445194995477358631e2
    p = (p * a + 9.34528527171957607540e2) * a + 1.02755188689515710272e3
    p = p * a + 5.57535335369399327526e2
    q = (a + 1.32281951154744992508e1) * a + 8.67072140885989742329e1
    q = (q * a + 3.54937778887819891062e2) * a + 9.75708501743205489753e2
    q = (q * a + 1.82390916687909736289e3) * a + 2.24633760818710981792e3
    q = (q * a + 1.65666309194161350182e3) * a + 5.57535340817727675546e2
    r = (5.64189583547755073984e-1 * a + 1.27536670759978104416e0) * a + 5.01905042251180477414e0
    r = ((r * a + 6.16021097993053585195e0) * a + 7.40974269950448939160e0) * a + 2.97886665372100240670e0
    s = (a + 2.26052863220117276590e0) * a + 9.39603524938001434673e0
    s = (s * a + 1.20489539808096656605e1) * a + 1.70814450747565897222e1
    s = (s * a + 9.60896809063285878198e0) * a + 3.36907645100081516050e0
    ratio = tl.where(a < 8.0, p / q, r / s)
    tail = tl.where(a > 28.0, 0.0, tl.exp(-tl.where(a > 28.0, 0.0, a * a)) * ratio)
    tail = tl.where(x < 0, 2.0 - tail, tail)
    return tl.where(a < 1.0, 1.0 - tl.erf(x), tl.where(x != x, x, tail))
