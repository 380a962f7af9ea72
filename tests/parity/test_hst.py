"""HST against reference results: a whole ViT with its side network, in evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
from linears import Case, cases, set_
from petiole.methods.side.hst import MetaTokens, SideNetwork

TOLERANCE = 1e-5


def renamed(name: str, depths: list[int]) -> str | None:
    """The reference's name of a parameter -> that of `SideNetwork`; None if it is the ViT's."""
    own, _, rest = name.partition(".")
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    if own.startswith("T_Bridge_"):
        return f"stages.{int(own[9:]) - 1}.bridge.{rest}"
    if own.startswith("m_proj_norm"):
        block = int(own[11:]) - 1
        stage = next(i for i, end in enumerate(ends) if block < end)
        return f"stages.{stage}.meta_norms.{block - ends[stage] + depths[stage]}.{rest}"
    if own.startswith("m_patch_embed"):
        for theirs, ours in {
            "conv.0": "embedding.first",
            "conv.1": "embedding.norm",
            "conv.3": "embedding.second",
            "proj": "embedding",
            "norm": "embedding_norm",
        }.items():
            if rest.startswith(f"{theirs}."):
                return f"stages.{int(own[13:]) - 1}.{ours}{rest[len(theirs) :]}"
    if own.startswith("m_block"):
        for theirs, ours in {
            "norm1": "attention_norm",
            "norm2": "mlp_norm",
            "attn.proj": "attn.o",
            "mlp.fc1": "up",
            "mlp.fc2": "down",
        }.items():
            rest = rest.replace(theirs, ours)
        return f"stages.{int(own[7:]) - 1}.blocks.{rest.replace('attn.', '')}"
    if own.startswith("m_norm"):
        return f"stages.{int(own[6:]) - 1}.norm.{rest}"
    return {"fc_norm": f"norm.{rest}", "head": f"head.{rest}"}.get(own)


def vit(case: Case) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    D = case.option("hidden_size")
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=D,
            num_hidden_layers=case.option("num_layers"),
            num_attention_heads=case.option("num_heads"),
            intermediate_size=int(D * case.option("mlp_ratio")),
            image_size=case.option("image_size"),
            patch_size=case.option("patch_size"),
            layer_norm_eps=case.option("vit_ln_eps"),
            qkv_bias=case.option("qkv_bias"),
            num_labels=case.option("num_classes"),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    assert case.option("act") == "gelu (erf)"
    base = model.vit
    modules = {"patch_embed.proj": base.embeddings.patch_embeddings.projection, "norm": base.layernorm}
    set_(base.embeddings.cls_token, case["param.cls_token"])
    set_(base.embeddings.position_embeddings, case["param.pos_embed"])
    for depth, layer in enumerate(base.layers):
        names = {
            "norm1": layer.layernorm_before,
            "norm2": layer.layernorm_after,
            "attn.proj": layer.attention.o_proj,
            "mlp.fc1": layer.mlp.fc1,
            "mlp.fc2": layer.mlp.fc2,
        }
        modules |= {f"blocks.{depth}.{name}": module for name, module in names.items()}
        linears = (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
        for own in ("weight", "bias"):
            whole = case.get(f"param.blocks.{depth}.attn.qkv.{own}")
            for linear, part in zip(linears, whole.chunk(3) if whole is not None else (), strict=False):
                set_(getattr(linear, own), part)
    for name, module in modules.items():
        for own, parameter in module.named_parameters():
            set_(parameter, case[f"param.{name}.{own}"])
    return model.double() if case.double else model


@pytest.mark.parametrize("path", cases("hst"))
def test_parity(path: Path) -> None:
    with Case(path, "hst") as case:
        depths = case.option("side_depths")
        model = vit(case)
        tuned = pt.attach(
            model,
            pt.HST(
                side_dims=case.option("side_dims"),
                side_heads=case.option("side_heads"),
                side_depths=depths,
                stage_end_layers=case.option("stage_end_layers"),
                num_meta_tokens=case.option("num_meta_tokens"),
                mlp_ratio=case.option("mlp_ratio_side"),
            ),
        )
        side = next(slot.delta for slot in tuned.slots if isinstance(slot.delta, SideNetwork))
        metas = [slot.delta for slot in tuned.slots if isinstance(slot.delta, MetaTokens)]
        for eps, found in (
            ("side_ln_eps", {side.stages[0].norm.eps, side.stages[0].blocks[0].mlp_norm.eps}),
            ("bridge_ln_eps", {side.stages[0].meta_norms[0].eps}),
            ("patch_ln_eps", {side.stages[0].embedding_norm.eps}),
            ("head_bn_eps", {side.norm.eps}),
        ):
            assert found == {case.option(eps)}, eps
        model.double() if case.double else model.float()
        own: dict[str, Tensor] = {**dict(side.named_parameters()), **dict(side.named_buffers())}
        counted, filled = 0, set()
        for name in (n[6:] for n in case.tensors if n.startswith("param.")):
            ours = renamed(name, depths)
            if ours is not None:
                set_(own[ours], case[f"param.{name}"])
                filled.add(ours)
        assert {n for n in own if not n.endswith("num_batches_tracked")} == filled
        for depth, meta in enumerate(metas):
            set_(meta.tokens, case[f"param.m_embeddings.{depth}"][0])
        for name in case.option("trainable"):
            counted += case[f"param.{name}"].numel()
        assert tuned.trainable == counted

        pooled: list[Tensor] = []
        side.norm.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
        logits = model.eval()(case["in.image"]).logits
        case.same("out.pooled", pooled[0], TOLERANCE)
        case.same("out.logits", logits, TOLERANCE)
        (logits * case["in.cotangent"]).sum().backward()
        whole = torch.cat([p.grad.flatten() for p in side.parameters() if p.grad is not None])
        for name in (n for n in case.tensors if n.startswith("grad.")):
            ours = renamed(name[5:], depths)
            if ours is None:
                gradient = metas[int(name.rpartition(".")[2])].tokens.grad[None]
            else:
                gradient = own[ours].grad
            hidden = name.endswith("attn.k.bias")  # what a softmax hides is rounding in both
            case.same(name, gradient, TOLERANCE, beside=whole if hidden else None)
