"""Templates of expressions, one on each line.

``{a}`` is the operand, and ``{r}`` one that is a batch of rows. ``{b}``, ``{c}`` and the conditions ``{m}``
and ``{k}`` can be broadcast to it. ``{n}`` is a number, ``{w}`` the width of the operand, ``{i}`` an index
into it, and ``{q}`` a parameter as wide. The statements after a semicolon change the new value in place.
"""

from __future__ import annotations

UNARY = """
torch.sigmoid({a})
torch.tanh({a})
torch.relu({a})
F.relu6({a})
F.gelu({a})
F.gelu({a}, approximate='tanh')
F.silu({a})
F.mish({a})
F.elu({a}, 0.7)
F.celu({a}, 1.3)
F.selu({a})
F.leaky_relu({a}, 0.2)
F.softplus({a})
F.softplus({a}, 2.0, 1.0)
F.softsign({a})
F.logsigmoid({a})
F.hardtanh({a}, -0.7, 0.4)
F.hardswish({a})
F.hardshrink({a}, 0.3)
F.softshrink({a}, 0.3)
F.tanhshrink({a})
F.threshold({a}, 0.1, -0.2)
F.hardtanh({a})
torch.exp(-({a}).abs())
torch.exp2(torch.tanh({a}))
torch.expm1(torch.sin({a}))
torch.log(({a}).abs() + 0.2)
torch.log2(({a}) ** 2 + 0.3)
torch.log10(({a}).abs() + 1)
torch.log1p(({a}) ** 2)
torch.sqrt(1 + ({a}) ** 2)
torch.rsqrt(1 + ({a}) ** 2)
torch.reciprocal(1 + ({a}).abs())
torch.square(torch.tanh({a}))
torch.sin({a})
torch.cos({a})
torch.tan(torch.sin({a}))
torch.asin(0.9 * torch.sin({a}))
torch.acos(0.9 * torch.tanh({a}))
torch.atan({a})
torch.sinh(torch.sin({a}))
torch.cosh(torch.tanh({a}))
torch.asinh({a})
torch.erf({a})
torch.acosh(1.5 + ({a}) ** 2)
torch.atanh(0.9 * torch.sin({a}))
torch.erfc({a})
torch.sinc({a})
({a}).abs()
torch.logit(torch.sigmoid({a}), 0.1)
-({a})
torch.tanh({a}) ** 2
torch.sin({a}) ** 3
(1 + ({a}) ** 2) ** 0.5
(1 + ({a}).abs()) ** -1
torch.sigmoid({a}) ** 1.7
2.0 ** torch.sin({a})
({a}).neg() * {n}
({a}) / 3
torch.nan_to_num({a})
({a}) - {n}
{n} - ({a})
({a}).clamp(-0.5, 0.5)
({a}).clamp(min={n})
torch.clamp_max({a}, {n})
(1 - 2 * ({a}) / 3 + 0.5) * math.pi
F.hardsigmoid({a})
({a}).detach() * torch.tanh({a})
torch.positive({a})
(torch.tanh({a}) - ({a})).detach() + ({a})
({a}).type_as(x)
({a}).to(x.dtype)
torch.square({a}).sqrt()
"""
JUMPS = """
torch.sign({a})
({a}).sgn() * ({a})
torch.floor({a})
({a}) + ({a}).ceil()
({a}).round()
({a}).round(decimals=1)
torch.trunc({a})
torch.frac({a})
({a}) % 0.7
torch.fmod({a}, 0.7)
torch.div({a}, 0.3, rounding_mode='floor') * 0.1
torch.div({a}, 0.3, rounding_mode='trunc') * 0.1
torch.remainder({a}, 1 + ({b}) ** 2)
torch.fmod({a}, {b})
({a}).detach() // 0.5
torch.copysign({a}, {b})
torch.signbit({a}) * ({a})
torch.heaviside(({a}).detach(), torch.zeros_like({a}))
"""
BINARY = """
({a}) + ({b})
({a}) - ({b})
torch.add({a}, {b}, alpha=0.3)
({a}) * torch.tanh({b})
({a}) * ({b})
torch.maximum({a}, {b})
({a}) / (1 + ({b}) ** 2)
({b}) - ({a})
torch.sigmoid({a}) ** torch.sin({b})
torch.min({a}, {b})
torch.fmax({a}, {b})
torch.fmin({a}, {b})
torch.lerp({a}, {b}, torch.sigmoid({a}))
torch.lerp({a}, {b}, 0.3)
torch.rsub({a}, {b})
torch.addcmul({a}, torch.tanh({a}), {b}, value=0.5)
torch.addcdiv({a}, {b}, 1 + ({c}) ** 2, value=0.5)
torch.clamp({a}, -torch.sigmoid({b}), torch.cos({c}).abs())
torch.hypot({a}, ({b}) + 2)
torch.subtract({b}, {a})
torch.atan2({a}, 1 + ({b}) ** 2)
torch.logaddexp({a}, {b})
torch.tanh({b}) * ({a}) + ({c})
torch.clamp({a}, max={b})
torch.sigmoid({b}) * ({a}) + (1 - torch.sigmoid({b})) * torch.tanh({c})
torch.clamp({a}, min={b})
"""
CHOICES = """
torch.where({m}, {a}, {b})
torch.where({m}, {a}, {n})
torch.where({m}, {n}, {a})
({a}).masked_fill({m}, {n})
({a}) * ({m})
({a}) * ({m}).to(x.dtype)
({a}) + ({m}).to(x.dtype)
({a}) * torch.where({m}, {b}, {c})
({a}) + ({m})
torch.where({m}, {b}, {a})
({a}) * (({m}).to(x.dtype) - ({k}).to(x.dtype))
({m}).to(({a}).dtype) - ({a})
({a}) * (({m}).int() + ({k}).int())
({a}) * ({m}).float()
({a}) * ({m}).double().to(x.dtype)
torch.where({m}, {a}, torch.where({k}, {b}, {c}))
({a}) * (1 - ({m}).to(x.dtype))
({a}) / (1 + ({m}).long())
({m}).type_as(x) * ({b}) + ({a})
({a}) - 0.5 * ({m})
({m}) * ({k}) * ({a})
torch.where({m}, torch.zeros_like({a}), {a})
({m}).to(x) * 0.7 + ({a})
torch.where({m}, {a}, -({a}))
"""
MASKS = """
({a}) > {n}
({a}) >= ({b})
({a}) < ({b})
({a}) <= {n}
({a}) != ({b})
({a}) == {n}
torch.isnan({a})
torch.isfinite({a})
torch.isinf({a})
torch.signbit({a})
~(({a}) > {n})
(({a}) > {n}) & (({b}) < {n})
(({a}) > {n}) | (({b}) > ({a}))
(({a}) > {n}) ^ (({b}) > {n})
torch.logical_and({a}, ({b}) > 0)
torch.logical_not(({a}) > ({b}))
({a}).bool()
torch.logical_xor(({a}) > 0, ({b}) > 0)
torch.logical_or({a} < 0, {b})
torch.arange({w}) < {i}
{q} > {n}
(({a}) > {n}).any(-1, keepdim=True)
(({a}) > {n}).all(-1, keepdim=True)
({a}).to(torch.bool)
(({a}) > 0) == (({b}) > 0)
({a}).argmax(-1, keepdim=True) == torch.arange({w})
({a}).argmin(-1, keepdim=True) != torch.arange({w})
torch.arange({w}) % 2 == 0
F.one_hot(({a}).argmax(-1), {w}) > 0
({q} > 0) & (({a}) > ({b}))
torch.gt({a}, {b}).bool()
(({a}) > 0).sum(-1, keepdim=True) > {i}
(({a}) > 0).cumsum(-1) > {i}
torch.tensor({flag})
({a} > {b}).logical_not()
"""
REDUCTIONS = """
({a}).sum(-1, keepdim=True)
({a}) - ({a}).mean(-1, keepdim=True)
({a}) / (1 + ({a}).var(-1, keepdim=True, correction=0))
({a}) / (1 + torch.cat([{a}, ({a}) + 1], -1).std(-1, keepdim=True))
({a}) / (1 + (({a}) + 0.1).norm(dim=-1, keepdim=True))
({a}) / (1 + ({a}).norm(p=1, dim=-1, keepdim=True))
({a}) / (1 + torch.linalg.vector_norm({a}, math.inf, -1, keepdim=True))
F.normalize(({a}) + 0.1, dim=-1, eps=0.1)
({a}) - ({a}).amax(-1, keepdim=True)
({a}) - ({a}).amin(-1, keepdim=True)
({a}) - ({a}).max(-1, keepdim=True)[0]
({a}) - ({a}).min(-1).values[..., None]
({a}) - ({a}).logsumexp(-1, keepdim=True)
({a}).softmax(-1)
({a}).log_softmax(-1)
F.softmin({a}, -1)
F.layer_norm({a}, ({w},), eps=0.1)
F.rms_norm({a}, ({w},), eps=0.1)
F.layer_norm({a}, ({w},), {q}, {q}, eps=0.1)
F.rms_norm({a}, ({w},), {q}, eps=0.1)
({a}).cumsum(-1) * 0.3
({a}).mean(-1, keepdim=True) + ({b})
({a}).softmax(-1).flip(-1).cumsum(-1)
({a}) * (({a}) > 0).sum(-1, keepdim=True) / {w}
({a}).argmax(-1, keepdim=True) * ({a})
({a}) * (({a}) > 0).to(x.dtype).mean(-1, keepdim=True)
({a}).sum(1, keepdim=True) * 0.3 + ({a})
({a}).softmax(1)
({a}).amax(1, keepdim=True) + ({b})
({a}) - ({a}).median(-1, keepdim=True)[0]
({a}).sum(dim=-1).unsqueeze(-1) - ({a})
({a}).mean(1, keepdim=True)
torch.tanh({a}).prod(-1, keepdim=True)
({a}).cumsum(1)
({a}).argmax(-1)[..., None].to(x.dtype) + ({b})
({a}).aminmax(dim=-1, keepdim=True)[1]
torch.var_mean({a}, -1, keepdim=True)[1]
"""
MOVES = """
torch.cat(({r}).chunk(2, -1)[::-1], -1)
torch.cat([({r})[:, {i}:], ({r})[:, :{i}]], -1)
torch.cat([({a})[..., ::2], ({a})[..., 1::2]], -1)
torch.stack([{a}, torch.sin({a})], 1).flatten(1)
({a}).roll(1, -1)
({a}).roll(3, -1)
({a}).flip(-1)
({a})[..., {i}]
({a})[..., [0, -1, {i}]]
F.pad({a}, (2, 1), value={n})[..., :{w}]
F.pad({r}, (1, 0))
({r})[:, :1].expand(-1, {w}) * ({r})
({r})[:, :2].repeat(1, 3)
({a})[..., {i}:]
({a}).repeat_interleave(2, -1)
({r}).unsqueeze(-1)
({r})[:, None]
({a}).flatten(1)
({r}).index_select(1, torch.arange({w}).flip(0))
({a}).gather(-1, torch.arange({w}).flip(0).expand_as({a}))
F.pad({r}, (1, 1)).unfold(1, 3, 1).mean(-1)
({a}).mT
({r}).movedim(-1, 1)
(({r})[:, :, None] * ({r})[:, None, :]).diagonal(dim1=1, dim2=2)
torch.tril(({r})[:, :4, None] * ({r})[:, None, :4]).sum(2)
torch.stack([{a}, {b}], 1).sum(1)
torch.stack([{a}, {b}], -1).flatten(1)
torch.cat([{a}, {a}], -1)
F.pad(({r})[:, None], (1, 0), mode='circular')[:, 0]
torch.cat([{q}.expand(len(x), -1), {r}], 1)
torch.einsum('bi,bj->bij', ({r})[:, :4], ({r})[:, -3:])
torch.narrow({r}, 1, 0, {i} + 1)
(torch.stack([{a}, {b}], 1).softmax(1) * torch.stack([{b}, {a}], 1)).sum(1)
(({r})[:, :, None] * torch.tanh({r})[:, None, :4]).mean(2)
({r}) * F.cosine_similarity({r}, ({r}) + 0.1, dim=1, eps=0.1)[:, None]
torch.zeros_like({a})
torch.full_like({a}, {n}) * ({a})
torch.ones_like({r})
({a}) * torch.arange({w}) / {w}
({a}) * torch.linspace(-1, 1, {w}, dtype=x.dtype)
({a}) * torch.tensor(0.5)
({a}) + torch.zeros(len(x), 1, dtype=x.dtype)
({r}) @ torch.eye({w}, dtype=x.dtype)
({r}) @ torch.ones({w}, {w}, dtype=x.dtype).tril()
({r})[:, :2] * ({r}).new_tensor([1.0, -2.0])[:{w}]
"""
MATRICES = """
{p_oi}
{p_oi}
{p_oi}
{p_io}.t()
torch.diag({p_o})[:, :{i_}]
torch.tril({p_oi})
({p_oi} - {p2_oi})
({p_o2} @ {p_2i})
F.normalize({p_oi}, dim=1)
torch.exp(-{p_oi}.abs())
torch.where({p_oi} > 0, {p_oi}, 0.1 * {p_oi})
{p_oi} * ({p2_oi} > 0).to(x.dtype)
{p_oi}.softmax(-1)
{p_oi} * {p_o}[:, None]
torch.outer({p_o}, {p_i})
{p_oi} * {p_1}
{p_2oi}[1]
{p_2oi}.sum(0)
{p_oi}.masked_fill(torch.ones({o}, {i_}).tril() == 0, 0.0)
{p_oi}.flip(0)
torch.exp(torch.complex(-{p_oi}.abs(), {p_oi})).real
{p_oi} * torch.arange({i_})
{p_oi}.detach()
{p_oi}.round()
torch.cat([{p_oi}, {p2_oi}])[:{o}]
{p_oi}.expand({o}, {i_})
torch.eye({o}, {i_}, dtype=x.dtype) + {p_oi}
{p_oi}.clamp(-0.5, 0.5)
{p_oi} / ({p_oi}.norm() + 1)
{p_i}.expand({o}, -1)
"""
LIKE = """
{q}
{q}
{p_1w}
{p_1}
{p_1}[0]
{q}.mean()
{n}
{n}
self.rate
({a}).mean(-1, keepdim=True)
(({a}) > 0).to(x.dtype)
torch.arange({w})
torch.sigmoid({q})
torch.exp(-F.softplus({q}))
({q} > 0).to(x.dtype)
self.scale.to(x.dtype)[:1]
({a}).detach()
(({a}) > ({n})).float()
torch.where({q} > 0, {q}, {n})
"""
OPTIONS = """
self.rate * ({a})
({a} if self.flag else torch.sin({a}))
getattr(torch, self.mode)({a})
({a}).roll(self.count, -1)
({a}) ** self.count
({a}) * self.scale[0].to(x.dtype)
({a})[..., :self.count]
(({a}) if self.mode == 'tanh' else -({a}))
torch.clamp({a}, max=self.rate)
"""
CHANGES = """
torch.zeros_like({r});_new[:, 1:] = ({r})[:, :-1];_new[:, 0] = 0.5
({r}).new_empty(({r}).shape);_new[:, ::2] = torch.sin({r})[:, ::2];_new[:, 1::2] = ({r})[:, 1::2] * 2
({a}).clone();_new.mul_(torch.sigmoid({a})).add_({a}, alpha=0.3);_new.clamp_(-3, 3)
({r}).clone();_new[:, :1].neg_();_new[_new < -2] = -2
({a}).clone();_new[{a} > 0.5] = {n}
({a}) * 2;_new.sigmoid_()
({a}) + 0.5;_new += {b};_new *= 0.5
({a}) * 1;_new[..., {i}] = 0.25
({a}) * 1;_new.masked_fill_({m}, {n})
"""

# New values of a state {h}. {v} is a recent value, {o} an old one, and {p} a parameter as wide as the state.
UPDATES = """
torch.tanh({v})
torch.tanh({v})
torch.sigmoid({v})
({v}) / (1 + ({v}).abs())
({v}).clamp(-1.5, 1.5)
F.hardtanh({v}, -2, 2)
0.5 * {h} + 0.5 * torch.sin({v})
{h} + 0.1 * torch.tanh({v})
torch.lerp({h}, torch.cos({v}), torch.sigmoid({h}))
torch.where({m}, torch.tanh({v}), {h})
"""
PASSED_ON = """
{h}
{o}
{o}
torch.ones_like({h})
{p}.expand(len(x), -1)
torch.where({m}, 1.0, 0.0) * {h}
"""
