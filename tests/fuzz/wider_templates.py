"""More templates, for the seeds from ``program.WIDER_FROM`` on. See :mod:`fuzz.templates` for the fields.

``{d}`` is the operand plus a small ramp, so that its elements rarely tie: of equal values, the compiler and
torch may sort different ones first. ``{s}`` is a square matrix that is a parameter.
"""

from __future__ import annotations

SCANS = """
torch.sigmoid({a}).cumprod(-1)
torch.cumprod(torch.tanh({a}), 1)
torch.relu({a}).cumprod(-1)
torch.tanh({a}).flip(-1).cumprod(-1).flip(-1)
({a}).cummax(-1).values
torch.cummin({a}, 1)[0]
torch.relu({a}).cummax(-1)[0] - ({a})
({a}).cummax(-1).indices * ({a})
({a}).logcumsumexp(-1)
torch.logcumsumexp({a}, 1)
({a}).flip(-1).logcumsumexp(-1).flip(-1)
torch.tanh({a}).prod(1, keepdim=True) * ({b})
torch.relu({a}).prod(-1, keepdim=True) + ({a})
torch.cumsum(({a}) > 0, -1) * ({a})
({m}).cumsum(1) * ({a}) * 0.3
torch.diff({a}, dim=-1)
torch.diff({a}, dim=-1, prepend=({a})[..., :1])
torch.cumulative_trapezoid({a}, dim=-1)
"""
SORTED = """
{d}.topk(1, -1).values * ({a})
{d}.topk({i} + 1, -1)[0].sum(-1, keepdim=True) + ({a})
torch.topk({d}, 1, -1, largest=False)[0] - ({a})
{d}.topk({i} + 1, -1).indices.to(x.dtype)
torch.zeros_like({a}).scatter(-1, {d}.topk({i} + 1, -1).indices, 1.0) * ({a})
({a}).scatter_add(-1, {d}.argsort(-1), torch.sin({a}))
torch.zeros_like({a}).scatter(-1, {d}.argsort(-1), {a})
torch.sort({d}, stable=True, dim=-1)[1] * ({a})
({a}).gather(-1, {d}.argsort(-1))
({a}).gather(-1, {d}.argmax(-1, keepdim=True)) - ({a})
torch.take_along_dim({a}, {d}.argmin(-1, keepdim=True), -1) * ({a})
{d}.sort(-1).values
torch.sort({d}, dim=-1, descending=True)[0]
({a}) * {d}.argsort(-1)
({a}) - {d}.kthvalue({i} + 1, -1, keepdim=True).values
({a}) * ({d} >= {d}.topk({i} + 1, -1).values[..., -1:])
F.one_hot({d}.argmax(-1), {w}) * ({a})
({a}) - {d}.median(-1, keepdim=True).values
"""
INTEGERS = """
((3 * torch.tanh({a})).long() * 5 + 2) * ({a})
(3 * torch.tanh({a})).long() ** 2 * ({b})
((30 * torch.tanh({a})).long() // 7) * ({a})
((30 * torch.sin({a})).long() / 7).to(x.dtype)
((30 * torch.sin({a})).long() % 7) * ({a})
((30 * torch.sin({a})).int() % -5).to(x.dtype)
torch.fmod((30 * torch.sin({a})).long(), 7) * ({a})
(3 * torch.sin({a})).int().clamp(-2, 1) * ({a})
((30 * torch.sin({a})).long() & 3) * ({a})
((30 * torch.sin({a})).long() >> 2).to(x.dtype)
((5 * torch.sin({a})).to(torch.int8) * 100) * ({a}) * 0.01
((2 * torch.sin({a})).abs().to(torch.uint8) - 1) * ({a}) * 0.01
((30 * torch.sin({a})).short() * 3000).to(x.dtype) * 0.0001
(9 * torch.sin({a})).long().sum(-1, keepdim=True) * ({a}) * 0.1
((9 * torch.sin({a})).long() > ({m}).long()) * ({a})
torch.maximum((3 * torch.sin({a})).long(), ({m}).long()) * ({a})
torch.where({m}, (3 * torch.sin({a})).long(), 2) * ({b})
(3 * torch.sin({a})).long().cumsum(-1) * ({a}) * 0.1
({m}).long().cumsum(-1) % 2 * ({a})
-(3 * torch.sin({a})).int() + ({b})
(3 * torch.sin({a})).long().abs() * ({m}) * 0.5 + ({a})
(({m}).int() - ({k}).int()).sign() * ({a})
torch.where({m}, 2, -1) * ({a})
torch.where({m}, 0.1, -0.3) + ({a})
({m}).sum(-1, keepdim=True) // 2 * ({a})
(3 * torch.sin({a})).long().amax(-1, keepdim=True) - ({a})
torch.count_nonzero({m}, -1)[..., None] * ({a})
"""
CASTS = """
(({a}).double() * 0.1 + 1).to(x.dtype)
(({a}).double().sum(-1, keepdim=True) / 3).to(x.dtype) + ({a})
(({a}).float() * 0.1 + 1).to(x.dtype)
(({a}).float() > 0.1) * ({a})
({a}) * (({a}).float() == ({a}))
({a}).softmax(-1, dtype=torch.float64).to(x.dtype)
(({a}).float() * {q}.float()).to(x.dtype)
(({a}) * torch.linspace(0, 1, {w}, dtype=torch.float64)).to(x.dtype)
linear(({r}).double(), {s}.double()).to(x.dtype)
linear(({r}).float(), {s}.float()).to(x.dtype)
({a}).double().logsumexp(-1, keepdim=True).to(x.dtype) - ({a})
({a}).float().mean(-1, keepdim=True).to(x.dtype) + ({a})
torch.float_power(torch.sigmoid({a}), {b}).to(x.dtype)
torch.where({m}, ({a}).double(), ({b}).double()).to(x.dtype)
torch.cat([({a}).double(), ({a}).double() + 1], -1).mean(-1, keepdim=True).to(x.dtype)
({a}).mean(-1, dtype=torch.float64, keepdim=True).type_as(x)
(({m}).double() * 0.1).to(x.dtype) + ({a})
"""
RARE = """
F.pad(({r})[:, None], (1, 1), mode='reflect')[:, 0]
F.pad(({r})[:, None], (2, 1), mode='replicate')[:, 0]
F.pad(({r})[:, None], (1, -1), mode='replicate')[:, 0]
F.pad(({r})[:, None], (1, 1), mode='circular')[:, 0]
torch.cdist({r}, {s})
torch.cdist({r}, {s}, p=1.0)
torch.cdist(({r})[:, None], {s}, p=3)[:, 0]
torch.cdist(({r})[:, :, None], ({r})[:, :4, None] + 0.3).mean(2)
F.batch_norm({r}, {q}.detach(), torch.exp({q}).detach(), {q}, None)
F.batch_norm({r}, {q}.detach(), torch.exp({q}).detach(), eps=0.1)
spike({a}, 10.0)
spike(linear({r}, {s}), 2.0) * ({r})
round_through({a})
clip_gradient({a}, 0.3) * 2
F.glu(torch.cat([{a}, {b}.expand_as({a})], -1), -1) if isinstance({b}, torch.Tensor) else ({a})
F.pairwise_distance({r}, ({r}) + {q}, keepdim=True)
torch.xlogy({a}, 1 + ({b}) ** 2)
torch.special.entr(torch.sigmoid({a}))
torch.special.ndtr({a})
torch.special.log1p(torch.sigmoid({a}))
torch.nan_to_num({a}).nansum(-1, keepdim=True) + ({a})
torch.nanmean({a}, -1, keepdim=True) - ({a})
torch.isclose({a}, {a}) * ({a})
torch.deg2rad({a}) * 30
torch.tensordot({r}, {s}, 1)
torch.kron({r}, torch.ones(1, 2, dtype=x.dtype))
torch.baddbmm(({r})[:, None], ({r})[:, None], {s}.expand(len(x), -1, -1), beta=0.5)[:, 0]
torch.addmv({q}.new_zeros(len(x)), {r}, {q})[:, None] + ({r})
torch.swapaxes(({r})[:, :, None], 1, 2).flatten(1)
torch.tensor_split({a}, 2, -1)[0]
torch.hstack([{r}, {r}])
torch.rot90(({r})[:, :, None], 1, (1, 2)).flatten(1)
torch.triu(({r})[:, :4, None] * ({r})[:, None, :4]).sum(1)
torch.std_mean(torch.cat([{a}, ({a}) + 1], -1), -1, keepdim=True)[0] * ({a})
F.scaled_dot_product_attention(({r})[:, None], torch.stack([{r}, {r}], 1), ({r})[:, None].repeat(1, 2, 1))
F.instance_norm(torch.stack([{r}, ({r}) * 2 + 1], 2), eps=0.1).sum(2)
torch.fft.irfft(torch.fft.rfft({q}), n={w}) * ({a})
torch.polar({q}.abs(), {q}).real * ({a})
torch.maximum({a}, ({a}).detach()) * ({b})
torch.unflatten({r}, 1, (-1, 1)).squeeze(2)
torch.atleast_2d({r}).clone().contiguous()
torch.scatter({a}, -1, torch.zeros_like({a}, dtype=torch.int64)[..., :1], {n})
torch.index_select({a}, -1, torch.arange({w}) // 2)
torch.index_add({r}, 1, torch.arange({w}) // 2, torch.sin({r}))
torch.index_copy({r}, 1, torch.arange({w}).flip(0), torch.sin({r}))
torch.select_scatter({r}, torch.sin(({r})[:, 0]), 1, {i})
torch.slice_scatter({r}, torch.sin(({r})[:, :1]), 1, 0, 1)
torch.linalg.norm({r}, dim=-1, keepdim=True) + ({r})
torch.renorm({s}, 2, 0, 0.5)[0] * ({r})
torch.linalg.matrix_power({s} * 0.3, 3)[0] * ({r})
linear({r}, torch.linalg.inv({s} @ {s}.t() + torch.eye({w}, dtype=x.dtype)))
linear({r}, torch.matrix_exp(({s} - {s}.t()) * 0.3))
"""
DRAWS = """
torch.rand_like({a}) * ({b})
({a}) + 0.1 * torch.randn_like({a})
torch.rand(len(x), {w}, dtype=x.dtype) * ({r})
({r}) + 0.1 * torch.randn(({r}).shape, dtype=x.dtype)
({r}) * torch.rand(len(x), 1)
torch.normal({a}, 0.3)
torch.normal({a}, torch.sigmoid({a}))
F.dropout({a}, 0.3)
F.dropout({a}, 0.4, self.training)
torch.bernoulli(torch.sigmoid({a})) * ({a})
torch.bernoulli(torch.full_like({a}, 0.3)) + ({a})
({a}) * (torch.rand_like({a}) < 0.7)
torch.where(torch.rand_like({a}) < torch.sigmoid({a}), {a}, {b})
F.gumbel_softmax({a}, dim=-1)
F.gumbel_softmax({a}, tau=0.5, hard=True, dim=-1) * ({a})
torch.empty_like({a}).exponential_().clamp(max=3) * ({a})
torch.empty_like({a}).uniform_(-1, 1) + ({a})
torch.zeros_like({a}).bernoulli_(0.4) * ({a})
"""
