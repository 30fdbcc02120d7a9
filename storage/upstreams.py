"""Names of the tensors of WavLM, HuBERT and wav2vec 2.0: those of transformers and fairseq, and of frontend/ssl.py."""

PART = "frontend.plugin.upstream."  # where such a network is in a model here
SPARE = r"frontend\.plugin\.upstream\.(?:blocks\.\d+|norm_blocks)\."  # above `ssl_blocks`
OPTIONAL = r".*\.convolutions\.\d+\.conv\.bias"  # 0 where the file has none
MARKS = (
    ("encoder.layers.0.attention.q_proj.weight", "feature_projection.projection.weight"),  # transformers
    ("encoder.layers.0.self_attn.q_proj.weight", "post_extract_proj.weight"),  # fairseq, and Microsoft's WavLM
)
OUTER = ("w2v_encoder.", "w2v_model.", "wavlm.", "hubert.", "wav2vec2.")  # of those that have a head for another task

_CONVOLUTION = r"feature_extractor\.conv_layers\.(\d+)\."
_POSITION = r"encoder\.(?:pos_conv_embed\.conv|pos_conv\.0)\."
_BLOCK = r"encoder\.layers\.(\d+)\."
_OF_A_BLOCK = (
    *(
        (rf"{attention}\.{theirs}_proj", ours)
        for attention in ("attention", "self_attn")
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
    ),
    (r"(?:layer_norm|self_attn_layer_norm)", "norm1"),
    (r"final_layer_norm", "norm2"),
    (r"(?:feed_forward\.intermediate_dense|fc1)", "up"),
    (r"(?:feed_forward\.output_dense|fc2)", "down"),
    (r"(?:attention\.gru_rel_pos_linear|self_attn\.grep_linear)", "gate"),
)
RENAMES = (
    # What pre-training or a task needed beside the network.
    (r"masked_spec_embed|mask_emb|label_embs_concat|layer_norm_for_extract\..*", None),
    (r"(?:lm_head|classifier|projector|quantizer|project_q|project_hid|final_proj|proj|layer_weights)(?:\..*)?", None),
    (r"tdnn\..*|feature_extractor\.(?:weight|bias)|objective\..*", None),  # transformers' x-vector behind it
    (_CONVOLUTION + r"(?:conv|0)\.(.*)", PART + r"convolutions.\1.conv.\2"),
    (_CONVOLUTION + r"(?:layer_norm|2|2\.1)\.(weight|bias)", PART + r"convolutions.\1.norm.\2"),
    (r"(?:feature_projection\.)?layer_norm\.(.*)", PART + r"norm.\1"),
    (r"(?:feature_projection\.projection|post_extract_proj)\.(.*)", PART + r"project.\1"),
    (_POSITION + r"bias", PART + "position.bias"),
    (_POSITION + r"(?:weight_g|parametrizations\.weight\.original0)", PART + "position.length"),
    (_POSITION + r"(?:weight_v|parametrizations\.weight\.original1)", PART + "position.direction"),
    (r"encoder\.layer_norm\.(.*)", PART + r"norm_blocks.\1"),
    (
        r"encoder\.layers\.0\.(?:attention\.rel_attn_embed|self_attn\.relative_attention_bias)\.weight",
        PART + "relative.values.weight",
    ),
    (_BLOCK + r"(?:attention\.gru_rel_pos_const|self_attn\.grep_a)", PART + r"blocks.\1.gate_scale"),
    *((_BLOCK + theirs + r"\.(weight|bias)", PART + rf"blocks.\1.{ours}.\2") for theirs, ours in _OF_A_BLOCK),
)
