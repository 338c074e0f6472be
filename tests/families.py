"""Trees of shapes with the parameter names of real models, and what the default policy decides about each leaf."""

D, F, V, L, H, K = 64, 128, 512, 8, 4, 16
"""Width, hidden width, vocabulary, layers stacked for a scan, heads, and width of a head."""


def stack(shape, axis=0, layers=L):
    return (*shape[:axis], layers, *shape[axis:])


def under(prefix, leaves, separator="/"):
    return {f"{prefix}{separator}{name}": what for name, what in leaves.items()}


PACKED, STORED = "default", "default, stored"
"""Packed, in the layout `output-major` or as stored."""

# For each family: the path of a leaf -> its shape, and the decision on it.

GEMMA = {
    "transformer/embedder/input_embedding": ((V, D), STORED),
    "transformer/final_norm/scale": ((D,), "norm"),
    **under(
        "transformer/layer_0",
        {
            "attn/q_einsum/w": ((H, D, K), PACKED),
            "attn/kv_einsum/w": ((2, 2, D, K), PACKED),
            "attn/attn_vec_einsum/w": ((H, K, D), PACKED),
            "attn/_query_norm/scale": ((K,), "norm"),
            "mlp/gating_einsum": ((2, D, F), PACKED),
            "mlp/linear": ((F, D), PACKED),
            "pre_attention_norm/scale": ((D,), "norm"),
            "pre_ffw_norm/scale": ((D,), "norm"),
        },
    ),
    "transformer/layer_0/attn/q_einsum/lora/a": ((D, H, 64), "LoRA adapter"),
    "transformer/layer_0/attn/q_einsum/lora/b": ((64, H, K), "LoRA adapter"),
}

BONSAI = {
    "embedder/embedding": ((V, D), STORED),
    "final_norm/scale": ((D,), "norm"),
    "lm_head/kernel": ((D, V), PACKED),
    **under(
        "layers/0",
        {
            **{f"attn/{name}_proj/kernel": ((D, D), PACKED) for name in "qkvo"},
            "attn/q_norm/scale": ((K,), "norm"),
            "mlp/gate_proj/kernel": ((D, F), PACKED),
            "mlp/up_proj/kernel": ((D, F), PACKED),
            "mlp/down_proj/kernel": ((F, D), PACKED),
            "input_layernorm/scale": ((D,), "norm"),
        },
    ),
}

HUGGING_FACE = {
    "model.embed_tokens.weight": ((V, D), STORED),
    "model.norm.weight": ((D,), "norm"),
    "lm_head.weight": ((V, D), STORED),
    **under(
        "model.layers.0",
        {
            **{f"self_attn.{name}_proj.weight": ((D, D), STORED) for name in "qkvo"},
            "self_attn.q_proj.bias": ((D,), "bias"),
            "self_attn.q_norm.weight": ((K,), "norm"),
            "self_attn.rotary_emb.inv_freq": ((K // 2,), "rotary table"),
            "mlp.gate_proj.weight": ((F, D), STORED),
            "mlp.down_proj.weight": ((D, F), STORED),
            "mlp.experts.gate_up_proj": ((4, D, 2 * F), PACKED),
            "input_layernorm.weight": ((D,), "norm"),
            "post_attention_layernorm.weight": ((D,), "norm"),
        },
        ".",
    ),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": ((64, D), "LoRA adapter"),
}

T5X = {
    "target/token_embedder/embedding": ((V, D), STORED),
    "target/decoder/logits_dense/kernel": ((D, V), PACKED),
    "target/encoder/relpos_bias/rel_embedding": ((128, 32), "position table"),
    "target/encoder/encoder_norm/scale": ((D,), "norm"),
    **under(
        "target/encoder/layers_0",
        {
            **{f"attention/{name}/kernel": ((D, D), PACKED) for name in ("query", "key", "value", "out")},
            **{f"mlp/{name}/kernel": ((D, F), PACKED) for name in ("wi_0", "wi_1")},
            "mlp/wo/kernel": ((F, D), PACKED),
            "pre_attention_layer_norm/scale": ((D,), "norm"),
        },
    ),
    "state/param_states/token_embedder/embedding/v_row": ((V,), "optimizer state"),
    "state/param_states/encoder/layers_0/mlp/wo/kernel/v": ((F, D), "optimizer state"),
    "state/param_states/encoder/layers_0/mlp/wo/kernel/m": ((F, D), "optimizer state"),
}

T5X_BEFORE = {
    "optimizer/target/encoder/layers_0/mlp/wo/kernel": ((F, D), PACKED),
    "optimizer/target/encoder/layers_0/pre_mlp_layer_norm/scale": ((D,), "norm"),
    "optimizer/state/param_states/encoder/layers_0/mlp/wo/kernel/v": ((F, D), "optimizer state"),
}

MAXTEXT_LAYER = {
    **{f"self_attention/{name}/kernel": ((D, H, K), PACKED) for name in ("query", "key", "value")},
    "self_attention/query/bias": ((H, K), "bias"),
    "self_attention/out/kernel": ((H, K, D), PACKED),
    "mlp/wi_0/kernel": ((D, F), PACKED),
    "mlp/wo/kernel": ((F, D), PACKED),
    "MoeBlock_0/gate/kernel": ((D, 64), PACKED),
    "MoeBlock_0/wi_0": ((4, D, F), PACKED),
    "MoeBlock_0/wi_1": ((4, D, F), PACKED),
    "MoeBlock_0/wo": ((4, F, D), PACKED),
    "pre_self_attention_layer_norm/scale": ((D,), "norm"),
    "post_self_attention_layer_norm/scale": ((D,), "norm"),
}
MAXTEXT_TOP = {
    "params/params/token_embedder/embedding": ((V, D), STORED),
    "params/params/decoder/position_embedder/embedding": ((V, D), "position table"),
    "params/params/decoder/decoder_norm/scale": ((D,), "norm"),
    "params/params/decoder/logits_dense/kernel": ((D, V), PACKED),
}
MAXTEXT = MAXTEXT_TOP | under("params/params/decoder/layers_0", MAXTEXT_LAYER)
# Stacked along axis 1, as in MaxText: 128 layers, so that the stacked norms and biases are as large as matrices.
MAXTEXT_SCANNED = MAXTEXT_TOP | under(
    "params/params/decoder/layers", {name: (stack(shape, 1, 128), why) for name, (shape, why) in MAXTEXT_LAYER.items()}
)

BIG_VISION = {
    "params/cls": ((1, 1, 4096), "learned token"),
    "params/pos_embedding": ((1, 196, D), "position table"),
    "params/embedding/kernel": ((16, 16, 3, D), PACKED),
    "params/embedding/bias": ((D,), "bias"),
    "params/head/kernel": ((D, 1000), PACKED),
    "params/MAPHead_0/probe": ((1, 1, 4096), "learned token"),
    "params/Transformer/encoder_norm/scale": ((D,), "norm"),
    **under(
        "params/Transformer/encoderblock_0",
        {
            "LayerNorm_0/scale": ((D,), "norm"),
            "LayerNorm_0/bias": ((D,), "bias"),
            "MlpBlock_0/Dense_0/kernel": ((D, F), PACKED),
            "MlpBlock_0/Dense_0/bias": ((F,), "bias"),
            "MultiHeadDotProductAttention_0/query/kernel": ((D, H, K), PACKED),
            "MultiHeadDotProductAttention_0/query/bias": ((H, K), "bias"),
        },
    ),
    # The same, stacked for a scan.
    "params/Transformer/encoderblock/LayerNorm_0/scale": ((128, D), "norm"),
    "params/Transformer/encoderblock/MlpBlock_0/Dense_0/bias": ((128, F), "bias"),
    "params/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": ((128, D, F), PACKED),
    "opt/0/mu/embedding/kernel": ((16, 16, 3, D), "optimizer state"),
}

RESNET = {
    "params/conv_init/kernel": ((7, 7, 3, D), PACKED),
    "params/bn_init/scale": ((D,), "norm"),
    "params/BottleneckResNetBlock_0/Conv_0/kernel": ((3, 3, D, D), PACKED),
    "params/BottleneckResNetBlock_0/BatchNorm_0/scale": ((D,), "norm"),
    "params/BottleneckResNetBlock_0/norm_proj/scale": ((D,), "norm"),
    "params/Dense_0/kernel": ((D, 1000), PACKED),
    "batch_stats/bn_init/mean": ((D,), "batch_stats"),
    "batch_stats/BottleneckResNetBlock_0/BatchNorm_0/var": ((D,), "batch_stats"),
}

TORCH_RESNET = {
    "conv1.weight": ((D, 3, 7, 7), STORED),
    "bn1.weight": ((D,), "norm"),
    "bn1.running_mean": ((D,), "statistics"),
    "layer1.0.downsample.0.weight": ((D, D, 1, 1), "too small" if D * D < 4096 else STORED),
    "layer1.0.downsample.1.weight": ((D,), "fewer than 2 axes"),
    "fc.weight": ((1000, D), STORED),
    "fc.bias": ((1000,), "bias"),
}

WHISPER = {
    "model/encoder/conv1/kernel": ((3, 80, D), PACKED),
    "model/encoder/embed_positions/embedding": ((1500, D), "position table"),
    "model/decoder/embed_tokens/embedding": ((V, D), STORED),
    "model/decoder/embed_positions/embedding": ((448, D), "position table"),
    **under(
        "model/encoder/layers/0",
        {
            "self_attn/q_proj/kernel": ((D, D), PACKED),
            "self_attn/q_proj/bias": ((D,), "bias"),
            "fc1/kernel": ((D, F), PACKED),
            "self_attn_layer_norm/scale": ((D,), "norm"),
        },
    ),
    "model.encoder.embed_positions.weight": ((1500, D), "position table"),
    "model.decoder.layers.0.encoder_attn.k_proj.weight": ((D, D), STORED),
    # OpenAI's own names
    "decoder.positional_embedding": ((448, D), "position table"),
    "decoder.blocks.0.mlp.0.weight": ((F, D), STORED),
    "decoder.blocks.0.mlp_ln.weight": ((D,), "norm"),
    "decoder.blocks.0.cross_attn_ln.bias": ((D,), "bias"),
}

UNET = {
    "conv_in/kernel": ((3, 3, 4, D * 4), PACKED),
    "time_embedding/linear_1/kernel": ((D, F), PACKED),
    "down_blocks_0/resnets_0/conv1/kernel": ((3, 3, D, D), PACKED),
    "down_blocks_0/resnets_0/norm1/scale": ((D,), "norm"),
    "down_blocks_0/resnets_0/time_emb_proj/kernel": ((F, D), PACKED),
    "down_blocks_0/attentions_0/proj_in/kernel": ((1, 1, D, D), PACKED),
    "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel": ((D, D), PACKED),
    "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_out_0/kernel": ((D, D), PACKED),
    "down_blocks_0/attentions_0/transformer_blocks_0/ff/net_0/proj/kernel": ((D, 8 * D), PACKED),
    "down_blocks_0/attentions_0/transformer_blocks_0/norm1/scale": ((D,), "norm"),
    "mid_block/attentions_0/norm/scale": ((D,), "norm"),
    "conv_norm_out/scale": ((D,), "norm"),
    "conv_out/bias": ((4,), "bias"),
    # PyTorch's names: diffusion transformers have linear layers inside their norms
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": ((8 * D, D), STORED),
    "transformer_blocks.0.norm1.linear.weight": ((6 * D, D), STORED),
    "norm_out.linear.weight": ((2 * D, D), STORED),
    "blocks.0.adaLN_modulation.1.weight": ((6 * D, D), STORED),
    "pos_embed.proj.weight": ((D, 16, 2, 2), STORED),
    "pos_embed.pos_embed": ((1, 1024, D), "position table"),
    "y_embedder.embedding_table.weight": ((1001, D), STORED),
    "scale_shift_table": ((6, 1024), "scale"),
}

KERAS = {
    "layers/dense/vars/0": ((D, F), PACKED),
    "layers/dense/vars/1": ((F,), "fewer than 2 axes"),
    "layers/embedding/vars/0": ((V, D), STORED),
    "layers/position_embedding/vars/0": ((V, D), "position table"),
    "layers/layer_normalization/vars/0": ((D,), "norm"),
    "layers/batch_normalization/vars/2": ((D,), "norm"),
    "layers/multi_head_attention/query_dense/vars/0": ((D, H, K), PACKED),
    "dense/kernel": ((D, F), PACKED),
    "dense/bias:0": ((F,), "bias"),
    "batch_normalization/moving_variance": ((D,), "statistics"),
    "optimizer/vars/2": ((D, F), "optimizer state"),
}

PENZAI = {
    "body/sublayers/0/table/embeddings/value/data_array": ((V, D), STORED),
    "body/sublayers/2/sublayers/0/delta/sublayers/1/input_to_query/sublayers/0/weights/value/data_array": (
        (D, H, K),
        PACKED,
    ),
    "body/sublayers/2/sublayers/0/delta/sublayers/0/sublayers/1/weights/value/data_array": ((D,), "fewer than 2 axes"),
    "body/sublayers/2/sublayers/1/delta/sublayers/0/bias/value/data_array": ((D, H, K), "bias"),
}

BERT = {
    "embeddings.word_embeddings.weight": ((V, D), STORED),
    "embeddings.position_embeddings.weight": ((V, D), "position table"),
    "embeddings.token_type_embeddings.weight": ((2, D), STORED),
    "embeddings.LayerNorm.weight": ((D,), "norm"),
    "encoder.layer.0.attention.self.query.weight": ((D, D), STORED),
    "encoder.layer.0.attention.self.query.bias": ((D,), "bias"),
    "encoder.layer.0.attention.output.LayerNorm.bias": ((D,), "bias"),
    "encoder.layer.0.intermediate.dense.weight": ((F, D), STORED),
    "pooler.dense.weight": ((D, D), STORED),
    "cls.predictions.transform.dense.weight": ((D, D), STORED),
    "encoder.rel_embeddings.weight": ((V, D), "position table"),  # DeBERTa
    "encoder.layer.0.attention.self.pos_q_proj.weight": ((D, D), STORED),
}

OTHERS = {
    "transformer.wte.weight": ((V, D), STORED),  # GPT-2
    "transformer.wpe.weight": ((V, D), "position table"),
    "transformer.h.0.attn.bias": ((1, 1, V, V), "bias"),  # a causal mask of that name
    "transformer.h.0.ln_1.weight": ((D,), "norm"),
    "shared.weight": ((V, D), STORED),  # T5
    "encoder.block.0.layer.0.SelfAttention.q.weight": ((D, D), STORED),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ((128, 32), "position table"),
    "encoder.block.0.layer.0.layer_norm.weight": ((D,), "norm"),
    "layers.0.blocks.0.attn.relative_position_bias_table": ((961, 8), "position table"),  # Swin
    "layers.0.blocks.0.attn_mask": ((64, 49, 49), "mask"),
    "blocks.0.attn.rel_pos_h": ((127, D), "position table"),  # SAM
    "mask_token": ((1, 1, 4096), "learned token"),
    "wav2vec2.encoder.pos_conv_embed.conv.weight_v": ((D, K, 128), STORED),
    "wav2vec2.encoder.pos_conv_embed.conv.weight_g": ((1, 1, 4096), "scale"),
    "wav2vec2.encoder.layers.0.self_attn.linear_pos.weight": ((D, D), STORED),  # conformers
    "wav2vec2.encoder.layers.0.self_attn.pos_bias_u": ((64, 64), "position table"),
    "backbone.layers.0.mixer.in_proj.weight": ((F, D), STORED),  # Mamba
    "backbone.layers.0.mixer.A_log": ((256, 16), "state-space decay"),
    "lstm.weight_ih_l0": ((4 * D, D), STORED),
    "lstm.bias_hh_l0": ((4 * D,), "bias"),
    "blocks.0.attn.W_Q": ((H, D, 64), PACKED),  # TransformerLens
    "blocks.0.attn.b_Q": ((64, 64), "bias"),
    "embed.W_E": ((V, D), STORED),
    "pos_embed.W_pos": ((V, D), "position table"),
    "freqs_cis": ((V, K), "rotary table"),
}
