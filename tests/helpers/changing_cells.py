"""Cells whose steps read Python values, and changes of these values."""

from __future__ import annotations

import sys
import textwrap
import types
from dataclasses import dataclass
from typing import Any

import unrolled as ur

_HEAD = """
import dataclasses, enum, functools, math, types
import numpy as np
import torch
from torch import nn, tanh
import unrolled as ur
from unrolled import Param
"""
_PARAMETERS = """
    w = Param("hidden", "input")
    u = Param("hidden", "hidden")
"""
_STEP = """
    def step(self, x, h):
        z = x @ self.w.T + h @ self.u.T
        return tanh({})
"""


@dataclass
class Change:
    """A cell, and a change of something that its step reads.

    Attributes:
        before: Source that precedes the class ``Tested``.
        members: Source of further members of the class.
        expression: The new state as a function of ``z``.
        change: The source of the change. It may use ``cell``, the cell of a layer.
    """

    before: str
    members: str
    expression: str
    change: str

    def create_module(self) -> Any:
        """Return a module that defines the class ``Tested``."""
        name = "changing_cells_module"
        module = sys.modules[name] = types.ModuleType(name)
        source = textwrap.dedent(self.before) + "\nclass Tested(BASES):" + _PARAMETERS
        source += textwrap.indent(textwrap.dedent(self.members), "    ") + _STEP.format(self.expression)
        exec(
            _HEAD + source.replace("BASES", "Mixin, ur.Cell" if "class Mixin" in source else "ur.Cell"),
            vars(module),
        )
        return module

    def apply(self, module: Any, layer: ur.Recurrent) -> None:
        """Change the value."""
        exec(textwrap.dedent(self.change), vars(module) | {"cell": layer._first, "module": module})


_SNAKE = """
class Snake:
    def __init__(self, a):
        self.a = a
    def __call__(self, z):
        return torch.sin(self.a * z)
    def __repr__(self):
        return "Snake()"
"""
CHANGES = {
    "item of a UserDict": Change(
        "from collections import UserDict\nbox = UserDict(a=1.0)", "", "z * box['a']", "box['a'] = 0.5"
    ),
    "item of a ChainMap": Change(
        "from collections import ChainMap\nbox = ChainMap({}, {'a': 1.0})",
        "",
        "z * box['a']",
        "box['a'] = 0.5",
    ),
    "value of a ConfigParser": Change(
        "from configparser import ConfigParser\nbox = ConfigParser()\nbox.read_dict({'s': {'a': '1.0'}})",
        "",
        "z * box.getfloat('s', 'a')",
        "box.set('s', 'a', '0.5')",
    ),
    "object behind a weak reference": Change(
        "import weakref\n" + _SNAKE + "snake = Snake(1.0)\nlink = weakref.ref(snake)",
        "",
        "link()(z)",
        "snake.a = 0.5",
    ),
    "memory of a view": Change(
        "data = np.ones(1)\nview = memoryview(data)", "", "z * view[0]", "data[0] = 0.5"
    ),
    "object as __call__ of a class": Change(
        _SNAKE + "snake = Snake(1.0)\nclass Other:\n    __call__ = snake\nother = Other()",
        "",
        "other(z)",
        "snake.a = 0.5",
    ),
    "module that is imported by its name": Change(
        """
        import importlib, sys
        sys.modules['values.of_a_cell'] = types.ModuleType('values.of_a_cell')
        sys.modules['values.of_a_cell'].a = 1.0
        """,
        "",
        "z * importlib.import_module('values.of_a_cell').a",
        "import sys; sys.modules['values.of_a_cell'].a = 0.5",
    ),
    "value of a relative import": Change(
        """
        import sys
        __package__ = 'package_of_a_cell'
        package = sys.modules[__package__] = types.ModuleType(__package__)
        package.__path__ = []
        package.values = sys.modules[__package__ + '.values'] = types.ModuleType(__package__ + '.values')
        package.values.a = 1.0
        def scale():
            from .values import a
            from . import values
            return a * values.a
        """,
        "",
        "z * scale()",
        "package.values.a = 0.5",
    ),
    "class attribute": Change("", "gain = 1.0", "z * self.gain", "Tested.gain = 0.5"),
    "class attribute that hides one": Change(
        "class Mixin:\n    gain = 1.0", "", "z * self.gain", "Tested.gain = 0.5"
    ),
    "attribute of a base class": Change(
        "class Mixin:\n    gain = 1.0", "", "z * self.gain", "Mixin.gain = 0.5"
    ),
    "instance attribute that hides one": Change("", "gain = 1.0", "z * self.gain", "cell.gain = 0.5"),
    "sign of zero": Change("", "zero = 0.0", "z + math.copysign(1.0, self.zero)", "Tested.zero = -0.0"),
    "type of a number": Change("", "n = 1", "z if type(self.n) is int else -z", "Tested.n = 1.0"),
    "option": Change("", "gain: float = 1.0", "z * self.gain", "cell.gain = 0.5"),
    "item of a dictionary": Change(
        "", "c = {'k': {'gain': 1.0}}", "z * self.c['k']['gain']", "Tested.c['k']['gain'] = 2.0"
    ),
    "item of a list": Change("", "c: object = [1.0, 2.0]", "z * sum(self.c)", "cell.c[1] = 0.5"),
    "number of items": Change("", "c: object = [1.0, 2.0]", "z * sum(self.c)", "cell.c.append(0.5)"),
    "member of a set": Change(
        "", "c = {1.0, 2.0}", "z * sum(self.c)", "Tested.c.discard(2.0); Tested.c.add(3.0)"
    ),
    "array": Change("", "c = np.ones(3)", "z * float(self.c[1])", "Tested.c[1] = 2.0"),
    "attribute of an option": Change(_SNAKE, "act: object = Snake(1.0)", "self.act(z)", "cell.act.a = 2.0"),
    "new attribute of an option": Change(
        "class A:\n    a = 1.0", "act: object = A()", "z * self.act.a", "cell.act.a = 2.0"
    ),
    "class of an option": Change("class A:\n    a = 1.0", "act: object = A()", "z * self.act.a", "A.a = 2.0"),
    "slot": Change(
        "class A:\n    __slots__ = ('a',)",
        "act: object = A()\nact.a = 1.0",
        "z * self.act.a",
        "cell.act.a = 2.0",
    ),
    "dataclass": Change(
        "@dataclasses.dataclass\nclass A:\n    a: float = 1.0",
        "act: object = A()",
        "z * self.act.a",
        "cell.act.a = 2.0",
    ),
    "namespace": Change(
        "c = types.SimpleNamespace(a=types.SimpleNamespace(b=1.0))", "", "z * c.a.b", "c.a.b = 2.0"
    ),
    "float with attributes": Change(
        "class F(float):\n    pass", "f = F(1.0)", "z * self.f", "Tested.f = F(2.0)"
    ),
    "module as an option": Change(
        "", "act: object = nn.LeakyReLU(0.1)", "self.act(z)", "cell.act.negative_slope = 0.5"
    ),
    "global": Change("gain = 1.0", "", "z * gain", "module.gain = 0.5"),
    "global in a function": Change(
        "gain = 1.0\ndef outer(z):\n    return inner(z)\ndef inner(z):\n    return z * gain",
        "",
        "outer(z)",
        "module.gain = 0.5",
    ),
    "function": Change(
        "def act(z):\n    return z", "", "act(z)", "def act(z):\n    return -z\nmodule.act = act"
    ),
    "code of a function": Change(
        "def act(z):\n    return z", "", "act(z)", "act.__code__ = (lambda z: -z).__code__"
    ),
    "default argument": Change(
        "def act(z, c={'k': 1.0}):\n    return z * c['k']", "", "act(z)", "act.__defaults__[0]['k'] = 2.0"
    ),
    "attribute of a function": Change(
        "def act(z):\n    return z * act.k\nact.k = 1.0", "", "act(z)", "act.k = 2.0"
    ),
    "closure": Change(
        "def make(k):\n    def act(z):\n        return z * k\n"
        "    def put(v):\n        nonlocal k\n        k = v\n    return act, put\n"
        "act, put = make(1.0)",
        "",
        "act(z)",
        "put(2.0)",
    ),
    "decorated function": Change(
        "k = 1.0\n@torch.no_grad()\ndef act(z):\n    return z * k", "", "z + act(z)", "module.k = 2.0"
    ),
    "partial": Change(
        "c = {'k': 1.0}",
        "act: object = functools.partial(lambda c, z: z * c['k'], c)",
        "self.act(z)",
        "c['k'] = 2.0",
    ),
    "method": Change("", "def act(self, z):\n    return z", "self.act(z)", "Tested.act = lambda self, z: -z"),
    "static method": Change(
        "",
        "@staticmethod\ndef act(z):\n    return z",
        "self.act(z)",
        "Tested.act = staticmethod(lambda z: -z)",
    ),
    "class method": Change(
        "", "k = 1.0\n@classmethod\ndef act(cls, z):\n    return z * cls.k", "self.act(z)", "Tested.k = 2.0"
    ),
    "property": Change(
        "k = 1.0", "@property\ndef gain(self):\n    return k", "z * self.gain", "module.k = 2.0"
    ),
    "method of a base class": Change(
        "class Mixin:\n    def act(self, z):\n        return z",
        "def act(self, z):\n    return super().act(z)",
        "self.act(z)",
        "Mixin.act = lambda self, z: -z",
    ),
    "computed name": Change("", "k1 = 1.0", "z * getattr(self, 'k' + str(1))", "Tested.k1 = 2.0"),
    "named by an option": Change(
        "", "mode: str = 'k1'\nk1 = 1.0", "z * getattr(self, self.mode)", "Tested.k1 = 2.0"
    ),
    "module that the step imports": Change(
        "import sys\nother = sys.modules['other_module'] = types.ModuleType('other_module')\nother.k = 1.0\n"
        "def act(z):\n    import other_module\n    return z * other_module.k",
        "",
        "act(z)",
        "other.k = 2.0",
    ),
    "cached function": Change(
        "k = 1.0\ndef inner(z):\n    return z * k\nget = functools.lru_cache(lambda: inner)",
        "",
        "get()(z)",
        "module.k = 2.0",
    ),
    "tensor of a module, through .data": Change(
        "k = torch.tensor(1.0)", "", "z * k", "module.k.data.fill_(2.0)"
    ),
    "tensor of a module, through NumPy": Change(
        "k = torch.ones(4, dtype=torch.bfloat16)", "", "z * k", "module.k.view(torch.int16).numpy()[:] = 7"
    ),
    "single dispatch": Change(
        "k = 1.0\n@functools.singledispatch\ndef act(z):\n    return z\n"
        "@act.register\ndef of_tensor(z: torch.Tensor):\n    return z * k",
        "",
        "act(z)",
        "module.k = 2.0",
    ),
    "getter": Change(
        "import operator\nget = operator.attrgetter('a.b')\n"
        "c = types.SimpleNamespace(a=types.SimpleNamespace(b=1.0))",
        "",
        "z * get(c)",
        "c.a.b = 2.0",
    ),
    "array of the standard library": Change(
        "import array", "c = array.array('d', [1.0])", "z * self.c[0]", "Tested.c[0] = 2.0"
    ),
    "metaclass": Change(
        "class Meta(type):\n    k = 1.0\nclass A(metaclass=Meta):\n    pass", "", "z * A.k", "Meta.k = 2.0"
    ),
    "enum": Change(
        "class E(enum.Enum):\n    A = 1.0\n    B = 2.0", "e: object = E.A", "z * self.e.value", "cell.e = E.B"
    ),
    "environment variable": Change(
        "import os\nos.environ['UNROLLED_TESTED'] = '1.0'",
        "",
        "z * float(os.environ['UNROLLED_TESTED'])",
        "os.environ['UNROLLED_TESTED'] = '2.0'",
    ),
    "environment variable by name": Change(
        "import os\nfrom os import getenv\nos.environ.pop('UNROLLED_TESTED', None)",
        "",
        "z * float(getenv('UNROLLED_TESTED', 1.0))",
        "os.environ['UNROLLED_TESTED'] = '2.0'",
    ),
    "environment variable by a computed name": Change(
        "import os\nos.environ['UNROLLED_TESTED'] = '1.0'",
        "",
        "z * float(os.environ['_'.join(('UNROLLED', 'TESTED'))])",
        "os.environ['UNROLLED_TESTED'] = '2.0'",
    ),
    "context variable": Change(
        "import contextvars\nc = contextvars.ContextVar('c', default=1.0)", "", "z * c.get()", "c.set(2.0)"
    ),
    "the step": Change(
        "", "", "z", "def step(self, x, h):\n    return tanh(x @ self.w.T - h @ self.u.T)\nTested.step = step"
    ),
}
