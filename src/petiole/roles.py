"""The short table of names that model families use: which module name plays which role.

Names are compared in lower case, without a list index or a wrapped linear at the end (`to_out.0` is `to_out`). A name with a dot is the
end of a path. An architecture is never named; a new family needs a word here at most, and what the table can't say is inferred from shapes
(`dissection.py`).
"""

from __future__ import annotations

from typing import Literal, get_args

LinearRole = Literal["q", "k", "v", "o", "qkv", "up", "gate", "down", "gate_up", "router", "linear"]
SublayerRole = Literal["attention", "cross_attention", "ffn", "mixer", "block"]
OutsideRole = Literal[
    "embedding", "position_embedding", "type_embedding", "patch_embedding", "pooler", "head", "lm_head"
]
Role = Literal[LinearRole, SublayerRole, OutsideRole, "norm", "conv"]

ROLES: tuple[str, ...] = get_args(Role)
ATTENTION_ROLES = ("q", "k", "v", "o", "qkv")
FFN_ROLES = ("up", "gate", "down", "gate_up", "router")
OUTSIDE_ROLES: tuple[str, ...] = get_args(OutsideRole)


def _names(**table: str) -> dict[str, frozenset[str]]:
    return {role: frozenset(names.split()) for role, names in table.items()}


# Inside an attention module.
ATTENTION = _names(
    q="q q_proj q_lin q_attn q_linear query query_proj query_layer to_q wq w_q linear_q in_proj_q q_b_proj "
    "projection_query q_head project_q",
    k="k k_proj k_lin k_linear key key_proj key_layer to_k wk w_k linear_k in_proj_k projection_key k_head project_k",
    v="v v_proj v_lin v_linear value value_proj value_layer to_v wv w_v linear_v in_proj_v "
    "projection_value v_head project_v",
    qkv="qkv qkv_proj wqkv to_qkv c_attn query_key_value w_pack qkv_linear att_proj",
    kv="kv kv_proj to_kv wkv key_value",
    o="o o_proj out_proj out_lin to_out wo w_o proj projection c_proj dense output.dense out output linear_out o_linear "
    "output_proj proj_out projection_layer post_proj attention_out post",
)

# Inside a feed-forward network. `up` alone may hold gate and up side by side: its shape tells.
FFN = _names(
    gate="gate_proj wi_0 w1 gate w_gate linear_gate",
    up="up_proj up fc1 fc_1 lin1 linear1 linear_1 layer_1 c_fc fc_in fc wi wi_1 w3 dense_h_to_4h intermediate.dense intermediate_dense "
    "ffn ffn1 pwconv1 net.0 net.0.proj mlp.0 ff.0 ffn.0 feed_forward.0 input_linear weights_in w12 gate_up_proj gate_and_up_proj w_in "
    "key",
    down="down_proj down fc2 fc_2 lin2 linear2 linear_2 layer_2 c_proj fc_out wo w2 dense_4h_to_h output.dense output_dense "
    "ffn_output ffn2 pwconv2 net.2 net.3 mlp.2 mlp.3 ff.2 ff.3 ffn.2 ffn.3 feed_forward.2 feed_forward.3 output_linear weights_out "
    "proj_out w_out value",
    router="gate router wg",
)
WRAPPED = frozenset({"linear", "base_layer"})  # names of a linear inside the module that plays its role
EXPERTS = frozenset(
    {"experts", "expert", "local_experts"}
)  # lists of feed-forward networks, or one module that packs them

# A fused tensor is split only where the order of its parts is known. A fused qkv is q, then k, then v, all heads of each; but under these
# names it is, for each group of heads, its queries, its key and its value; and a module with these attributes has an order of its own.
QKV_BY_GROUP = frozenset({"query_key_value"})
SCRAMBLED = ("mp_num",)
UP_FIRST = frozenset({"geglu", "swiglu"})  # classes of layers whose fused projection holds up before gate
GATE_FIRST = frozenset({"gate_up_proj", "gate_and_up_proj", "wi", "weights_in", "w12", "input_linear"})

CROSS = frozenset(
    {
        "cross_attention",
        "crossattention",
        "cross_attn",
        "encoder_attn",
        "encoder_attention",
        "encdecattention",
        "multihead_attn",
        "xattn",
    }
)
MIXER = frozenset(
    {
        "mamba",
        "mixer",
        "linear_attn",
        "linear_attention",
        "ssm",
        "temporal_block",
        "short_conv",
        "conv",
        "time_mix",
        "rnn",
    }
)

# Attributes of an attention module or its configuration, in the order in which they are tried.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "encoder_attention_heads")
KEY_VALUE_HEADS = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "num_kv_groups")
HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_kv", "size_per_head")

# Words on the path to a stack that name it, and the order in which stacks run.
STACK_WORDS = {
    "text": "text text_model text_encoder text_tower language_model textual llm",
    "vision": "vision vision_model vision_tower vision_encoder visual image_encoder vision_backbone",
    "audio": "audio audio_tower audio_model audio_encoder speech speech_encoder",
    "encoder": "encoder",
    "decoder": "decoder text_decoder",
    "down": "down_blocks downs",
    "mid": "mid_block mid",
    "up": "up_blocks ups",
    "backbone": "backbone conv_encoder",
}
STACK_NAMES = {word: name for name, words in STACK_WORDS.items() for word in words.split()}
STACK_ORDER = ("backbone", "vision", "audio", "text", "encoder", "decoder", "down", "mid", "up")
STAGE = frozenset({"mid_block", "mid"})  # modules whose lists run in turn though no list holds them
MODALITIES = frozenset({"text", "vision", "audio"})

_OUTPUTS = _names(
    head="classifier classifiers classification_head cls_classifier distillation_classifier score scores fc head heads head_dist "
    "qa_outputs cls_head output_layer logits_proj logits decode_head auxiliary_head bbox_predictor class_labels_classifier "
    "multiple_choice_head",
    lm_head="lm_head embed_out output_projection lm_heads",
)
HEAD, LM_HEAD = _OUTPUTS["head"], _OUTPUTS["lm_head"]
