"""The functions of one element that the compiler knows: torch's name to C++ on vectors."""

from __future__ import annotations

import operator

import torch

aten = torch.ops.aten
getitem = operator.getitem

PLAIN: dict[object, str] = {
    aten.exp.default: "exp({0})",
    aten.sigmoid.default: "sigmoid({0})",
    aten.tanh.default: "tanh({0})",
    aten.relu.default: "relu({0})",
    aten.log.default: "log({0})",
    aten.log1p.default: "log1p({0})",
    aten.expm1.default: "expm1({0})",
    aten.sin.default: "sin({0})",
    aten.cos.default: "cos({0})",
    aten.erf.default: "erf({0})",
    aten.sqrt.default: "sqrt({0})",
    aten.rsqrt.default: "(splat(1) / sqrt({0}))",
    aten.reciprocal.default: "(splat(1) / {0})",
    aten.neg.default: "(-{0})",
    aten.abs.default: "absolute({0})",
    aten.sign.default: "sign({0})",
    aten.clone.default: "{0}",
    aten.alias.default: "{0}",
    aten.detach.default: "{0}",
    aten.mul.Tensor: "({0} * {1})",
    aten.mul.Scalar: "({0} * {1})",
    aten.div.Tensor: "({0} / {1})",
    aten.div.Scalar: "({0} / {1})",
    aten.maximum.default: "maximum({0}, {1})",
    aten.minimum.default: "minimum({0}, {1})",
    aten.pow.Tensor_Scalar: "pow({0}, {1})",
    aten.pow.Tensor_Tensor: "pow({0}, {1})",
    aten.where.self: "where({0}, {1}, {2})",
    aten.gt.Scalar: "truth({0} > {1})",
    aten.gt.Tensor: "truth({0} > {1})",
    aten.ge.Scalar: "truth({0} >= {1})",
    aten.ge.Tensor: "truth({0} >= {1})",
    aten.lt.Scalar: "truth({0} < {1})",
    aten.lt.Tensor: "truth({0} < {1})",
    aten.le.Scalar: "truth({0} <= {1})",
    aten.le.Tensor: "truth({0} <= {1})",
    aten.eq.Scalar: "truth({0} == {1})",
    aten.ne.Scalar: "truth({0} != {1})",
}
