"""p-Adapter against the official implementation, after self-attention and across: the real attention of BERT, and the graph as it was built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

import linears
import petiole as pt
from linears import Case, set_
from petiole.methods.adapters.p_adapter import PLaplacian, messages

TOLERANCE = 1e-4
ADAPTER = ("down", "gate", "up")


class Layer(nn.Module):
    """The attention of a BERT layer with its output projection and norm, self or across; nothing else of it runs."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.cross = bool(case.option("cross"))
        config = BertConfig(
            hidden_size=case.option("heads") * case.option("head_dim"),
            num_attention_heads=case.option("heads"),
            layer_norm_eps=case.option("ln_eps"),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=self.cross,
            add_cross_attention=self.cross,
            attn_implementation="eager",
        )
        self.layers = nn.ModuleList(BertLayer(config, layer_idx=i) for i in range(2))
        names = {"attn.query": "self.query", "attn.key": "self.key", "attn.value": "self.value"}
        names |= {"dense": "output.dense", "ln": "output.LayerNorm"}
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                set_(self.attention.get_parameter(f"{ours}.{kind}"), case[f"param.{theirs}.{kind}"])

    @property
    def attention(self) -> nn.Module:
        return self.layers[0].crossattention if self.cross else self.layers[0].attention

    def forward(self, x: Tensor, states: Tensor | None, mask: Tensor) -> Tensor:
        if self.cross:
            return self.attention(x, encoder_hidden_states=states, encoder_attention_mask=mask)[0]
        return self.attention(x, attention_mask=mask)[0]


def method_of(case: Case) -> pt.Method:
    return pt.PAdapter(
        p_self=case.option("p"),
        p_cross=case.option("p"),
        mu=case.option("mu"),
        reduction_factor=case.option("reduction_factor"),
        pool_len=case.option("pool_len"),
        eps=case.option("eps"),
        targets=("cross",) if case.option("cross") else ("self",),
        layers=(0,),
    )


def fill(delta: PLaplacian, case: Case) -> None:
    for name in ADAPTER:
        set_(getattr(delta, name).weight, case[f"param.{name}.weight"])
        set_(getattr(delta, name).bias, case[f"param.{name}.bias"])
    with torch.no_grad():
        delta.p.copy_(case["param.p"].squeeze())
        delta.theta.copy_(case["param.mu_raw"].squeeze())


@pytest.mark.parametrize("path", linears.cases("p-adapter"))
def test_case(path: Path) -> None:
    with Case(path, "p-adapter") as case:
        assert case.kind == ("cross_attention" if case.option("cross") else "self_attention")
        layer(case)
        graph(case)


def layer(case: Case) -> None:
    """The whole sub-layer, through petiole."""
    cross = bool(case.option("cross"))
    model = Layer(case)
    tuned = pt.attach(model, method_of(case))
    (delta,) = [slot.delta for slot in tuned.slots]
    assert isinstance(delta, PLaplacian)
    fill(delta, case)
    assert float(delta.theta.detach()) == pytest.approx(case.option("mu_raw"))
    assert float(delta.mu.detach()) == pytest.approx(case.option("mu_effective"), rel=1e-6)

    x = case["in.x"].clone().requires_grad_()
    states = case["in.encoder_states"] if cross else None
    assert x.shape[:2] == (case.option("B"), case.option("T"))
    length = case.option("S")  # of what is attended to; of no use in self-attention
    assert states is None or states.shape[1] == length
    y = model(x, states, case["in.mask"])
    case.same("out.y", y, TOLERANCE)
    wanted = [x, delta.p, delta.theta, delta.down.weight, delta.up.weight]
    names = ("x", "p", "mu_raw", "down.weight", "up.weight")
    for name, grad in zip(names, linears.gradients(y, case["in.grad_out"], *wanted), strict=True):
        case.same(f"grad.{name}", grad.view(case[f"grad.{name}"].shape), TOLERANCE)


def graph(case: Case) -> None:
    """From the graph on: its whole matrix is given, of which petiole forms the part that is used."""
    heads, tokens, cross = case.option("heads"), case.option("T"), bool(case.option("cross"))
    linear = nn.functional.linear
    nodes = linear(case["in.node_features"], case["param.dense.weight"], case["param.dense.bias"])
    f = linear(nodes, case["param.down.weight"], case["param.down.bias"]).unflatten(-1, (heads, -1)).transpose(1, 2)
    A, mu = case["in.attention"], torch.tensor(case.option("mu_effective"))
    if cross:
        A, own, f = A[:, :, :tokens, tokens:], f[:, :, :tokens], f[:, :, tokens:]
    else:
        own = f
    o = messages(A, own, f, case["param.p"].squeeze(), mu, case.option("eps"), keeps=not cross)
    h = linear(case["in.context"], case["param.dense.weight"], case["param.dense.bias"])
    gate = nn.functional.gelu(linear(h, case["param.gate.weight"], case["param.gate.bias"]))
    h = h + linear(gate * o.transpose(1, 2).flatten(2), case["param.up.weight"], case["param.up.bias"])
    y = nn.functional.layer_norm(
        h + case["in.x"], h.shape[-1:], case["param.ln.weight"], case["param.ln.bias"], case.option("ln_eps")
    )
    case.same("out.y", y, TOLERANCE)
