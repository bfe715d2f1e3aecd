"""The layers that random networks are made of: the ways in which people write linear layers and attention, and what
stands around them.

Every step maps `[B, S, D]` to `[B, S, D']`; `made(random, width)` draws one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.oracle import attend, project

Context = dict[str, Tensor]


class Step(nn.Module):
    """One step of a network; `path` is where it stands in it, `exact` whether the oracle knows what it computes."""

    exact = True
    path = ""
    out = 0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        raise NotImplementedError

    def name(self, part: str) -> str:
        return f"{self.path}.{part}" if part else self.path


LINEAR_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "linear": F.linear,
    "transposed": lambda x, w, b: x @ w.T if b is None else x @ w.T + b,
    "matmul": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)) if b is None else b + torch.matmul(x, w.t()),
    "addmm": lambda x, w, b: (
        torch.mm(x.reshape(-1, x.shape[-1]), w.t()).reshape(*x.shape[:-1], -1)
        if b is None
        else torch.addmm(b, x.reshape(-1, x.shape[-1]), w.t()).view(*x.shape[:-1], w.shape[0])
    ),
}


class Linear(Step):
    def __init__(self, width: int, out: int, form: str, bias: bool) -> None:
        super().__init__()
        self.proj, self.form, self.out = nn.Linear(width, out, bias=bias), LINEAR_FORMS[form], out

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return project(self.name("proj"), x, self.proj.weight, self.proj.bias, self.form)


class Module(Step):
    """A linear layer called as a module, with a hook-free call stack of its own."""

    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(width, out, bias=bias), out

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return project(self.name("fc"), x, self.fc.weight, self.fc.bias, lambda x, w, b: self.fc(x))


class Parallel(Step):
    """Several linear layers on one tensor, joined."""

    def __init__(self, width: int, out: int, join: str, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up = nn.Linear(width, out, bias=False), nn.Linear(width, out, bias=join == "cat")
        self.join, self.activation, self.out = join, activation, out * (2 if join == "cat" else 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        a = project(self.name("gate_proj"), x, self.gate_proj.weight, None, lambda x, w, b: self.gate_proj(x))
        b = project(self.name("up"), x, self.up.weight, self.up.bias, lambda x, w, b: self.up(x))
        a = self.activation(a)
        return torch.cat([a, b], -1) if self.join == "cat" else a * b if self.join == "mul" else a - b


class Residual(Step):
    """Norm, two linear layers, and the input added."""

    def __init__(self, width: int, hidden: int, norm: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.activation, self.out = norm, activation, width
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h = project(self.name("fc1"), self.norm(x), self.fc1.weight, self.fc1.bias, lambda x, w, b: self.fc1(x))
        h = self.activation(h)
        return x + project(self.name("fc2"), h, self.fc2.weight, self.fc2.bias, lambda x, w, b: self.fc2(x))


class Shared(Step):
    """One linear layer that runs twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(width, width), width

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for _ in range(2):
            x = torch.tanh(project(self.name("both"), x, self.both.weight, self.both.bias, F.linear))
        return x


class Piece(Step):
    """A linear layer with a part of a parameter, or with a weight that is computed from one."""

    exact = False  # what such a weight is called, and whether it is quantized at all, is not what is tested here

    def __init__(self, width: int, out: int, form: str) -> None:
        super().__init__()
        self.weight, self.form, self.out = nn.Parameter(torch.randn(2 * out, width) / width**0.5), form, out

    def forward(self, x: Tensor, context: Context) -> Tensor:
        weights = {
            "slice": lambda: self.weight[: self.out],
            "chunk": lambda: self.weight.chunk(2)[1],
            "scaled": lambda: self.weight[self.out :] * 0.5,
            "einsum": lambda: self.weight[self.out :],
        }
        w = weights[self.form]()
        return torch.einsum("bsk,nk->bsn", x, w) if self.form == "einsum" else F.linear(x, w)


def _masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return torch.where(mask, scores, torch.finfo(scores.dtype).min)
    return scores + mask


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = _masked(torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5, mask, causal)
    return torch.matmul(torch.softmax(scores, -1), v)


def _scaled_q(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k = k[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape[0], q.shape[1], k.shape[-2], k.shape[-1])
    v = v[:, :, None].expand(-1, -1, groups, -1, -1).reshape(*k.shape)
    scores = _masked((q * q.shape[-1] ** -0.5) @ k.mT, mask, causal)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **grouped)


ATTENTION_FORMS = {"sdpa": _sdpa, "eager": _eager, "scaled_q": _scaled_q}


class Attention(Step):
    """Projections, heads, attention in one of three ways to write it, and the projection of its result."""

    def __init__(self, width: int, heads: int, kv_heads: int, form: str, packing: str, causal: bool, mask: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, 8
        self.form, self.packing, self.causal, self.mask, self.out = ATTENTION_FORMS[form], packing, causal, mask, width
        inner, kv_inner = heads * self.head, kv_heads * self.head
        if packing == "separate":
            self.q_proj, self.k_proj = nn.Linear(width, inner), nn.Linear(width, kv_inner)
            self.v_proj = nn.Linear(width, kv_inner, bias=False)
        else:
            self.qkv = nn.Linear(width, inner + 2 * kv_inner)
        self.o_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self._operands(x, context["other"] if self.mask == "cross" else x)
        mask = context["mask"] if self.mask == "input" else None
        if self.mask == "float":
            mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype).masked_fill(context["mask"][0, 0], -3.0)
        y = attend(self.path, q, k, v, mask, self.causal, self.form)
        y = y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return x + project(self.name("o_proj"), y, self.o_proj.weight, self.o_proj.bias, lambda x, w, b: self.o_proj(x))

    def _operands(self, x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        if self.packing == "separate":
            return (
                self._heads("q_proj", x, self.heads),
                self._heads("k_proj", memory, self.kv_heads),
                self._heads("v_proj", memory, self.kv_heads),
            )
        qkv = project(self.name("qkv"), x, self.qkv.weight, self.qkv.bias, lambda x, w, b: self.qkv(x))
        b, s, _ = qkv.shape
        if self.packing == "unbind":
            return qkv.reshape(b, s, 3, self.heads, self.head).permute(2, 0, 3, 1, 4).unbind(0)
        if self.packing == "middle":
            return tuple(t.transpose(1, 2) for t in qkv.view(b, s, 3, self.heads, self.head).unbind(2))
        sizes = [self.heads * self.head, self.kv_heads * self.head, self.kv_heads * self.head]
        parts = qkv.split(sizes, -1)
        return tuple(t.view(b, s, -1, self.head).transpose(1, 2) for t in parts)

    def _heads(self, part: str, x: Tensor, heads: int) -> Tensor:
        layer = self.get_submodule(part)
        y = project(self.name(part), x, layer.weight, layer.bias, lambda x, w, b: layer(x))
        return y.view(y.shape[0], y.shape[1], heads, self.head).transpose(1, 2)


class Softcap(Step):
    """Attention whose scores are bounded: no fused form exists."""

    exact = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(width, 16), nn.Linear(width, 16), width

    def forward(self, x: Tensor, context: Context) -> Tensor:
        scores = torch.tanh(self.q(x) @ self.k(x).mT / 4 / 5) * 5
        return scores.softmax(-1) @ x


class Function(Step):
    """Something without weights."""

    def __init__(self, width: int, function: Callable[[Tensor, Context], Tensor], out: int | None = None) -> None:
        super().__init__()
        self.function, self.out = function, width if out is None else out

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.function(x, context)


class Wrapped(Step):
    """A module of torch."""

    def __init__(self, width: int, module: nn.Module) -> None:
        super().__init__()
        self.module, self.out = module, width

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.module(x)


class HandNorm(nn.Module):
    """RMS norm as models write it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Buffered(Step):
    """A buffer or a parameter of the width that is added, multiplied or chosen."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))
        self.register_buffer("table", torch.randn(width))
        self.form, self.out = form, width

    def forward(self, x: Tensor, context: Context) -> Tensor:
        table: Any = self.table
        if self.form == "add":
            return x + table
        if self.form == "gamma":
            return x * self.gamma
        if self.form == "where":
            return torch.where(x > 0, x, x * table)  # without a jump, as rounding turns signs
        token = self.gamma.expand(x.shape[0], 1, -1)
        return torch.cat([token, x], 1)[:, : x.shape[1]]


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.leaky_relu, F.relu6, F.hardswish, F.softplus,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: x * torch.sigmoid(1.702 * x), lambda x: torch.relu(x).square(),
)  # fmt: skip

PLAIN: tuple[Callable[[Tensor, Context], Tensor], ...] = (
    lambda x, c: x * 0.125,
    lambda x, c: x / 3 + 1,
    lambda x, c: x.clamp(-1, 1),
    lambda x, c: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x, c: x.roll(1, -1),
    lambda x, c: x.flip(-1),
    lambda x, c: x - x.mean(1, keepdim=True) / 2,  # less all of it, nothing but rounding is left of equal rows
    lambda x, c: x.unsqueeze(2).squeeze(2),
    lambda x, c: F.pad(x, (0, 0, 1, 0))[:, :-1],
    lambda x, c: torch.stack([x, x.abs()], 0).mean(0),
    lambda x, c: x.clone().mul_(2.0),
    lambda x, c: F.relu_(x.clone()),
    lambda x, c: x.detach().to(torch.float32) + 0.5,
    lambda x, c: x.softmax(-1),
    lambda x, c: x.cumsum(1) / 4,
    lambda x, c: x.masked_fill(x > 1, 1.0),  # a jump there would tell apart what rounding does not
    lambda x, c: x.permute(0, 2, 1).reshape(x.shape[0], x.shape[2], -1).permute(0, 2, 1),
    lambda x, c: x + c["other"].mean(),
    lambda x, c: F.normalize(x, dim=-1),
    lambda x, c: torch.cat([x[:, 1:], x[:, :1]], 1),
    lambda x, c: x * 300.0,
    lambda x, c: x * 1e-4,
    lambda x, c: torch.maximum(x, -x.detach()),
)


KINDS = (
    *("linear",) * 2, *("attention",) * 3, *("plain",) * 2, "module", "parallel", "residual", "norm", "activation",
    "buffer", "shared", "piece", "softcap", "widths",
)  # fmt: skip


def made(draw: random.Random, width: int, other: int = 0) -> Step:
    """A random step for inputs of `width`; `other` is the width of a second sequence."""
    out = draw.choice((16, 32, 32, 48, 64, 24, 20))
    kind = draw.choice(KINDS)
    activation = draw.choice(ACTIVATIONS)
    if kind == "linear":
        return Linear(width, out, draw.choice(list(LINEAR_FORMS)), draw.random() < 0.6)
    if kind == "module":
        return Module(width, out, draw.random() < 0.6)
    if kind == "parallel":
        return Parallel(width, out, draw.choice(("cat", "mul", "sub")), activation)
    if kind == "residual":
        return Residual(width, out, _norm(draw, width), activation)
    if kind == "attention":
        return _attention(draw, width, width == other)
    if kind == "norm":
        return Wrapped(width, _norm(draw, width))
    if kind == "activation":
        return Function(width, lambda x, c: activation(x))
    if kind == "buffer":
        return Buffered(width, draw.choice(("add", "gamma", "where", "token")))
    if kind == "shared":
        return Shared(width)
    if kind == "piece":
        return Piece(width, out, draw.choice(("slice", "chunk", "scaled", "einsum")))
    if kind == "softcap":
        return Softcap(width)
    if kind == "widths":
        return draw.choice(
            (
                Function(width, lambda x, c: torch.cat([x, x.tanh()], -1), 2 * width),
                Function(width, lambda x, c: x[..., ::2], (width + 1) // 2),
                Function(width, lambda x, c: x.narrow(-1, 0, width - 4), width - 4),
            )
        )
    return Function(width, draw.choice(PLAIN))


def _norm(draw: random.Random, width: int) -> nn.Module:
    norm: nn.Module = draw.choice((nn.LayerNorm, nn.RMSNorm, HandNorm))(width)
    return norm


def _attention(draw: random.Random, width: int, cross: bool) -> Step:
    heads = draw.choice((2, 4))
    packing = draw.choice(("separate", "separate", "unbind", "middle", "split"))
    kv_heads = heads if packing in ("unbind", "middle") else draw.choice((heads, heads // 2, 1))
    causal = draw.random() < 0.4
    masks = ["none"] if causal else ["none", "input", "float"]
    if cross and packing == "separate" and not causal:
        masks.append("cross")
    return Attention(width, heads, kv_heads, draw.choice(list(ATTENTION_FORMS)), packing, causal, draw.choice(masks))
