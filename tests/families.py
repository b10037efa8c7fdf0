"""Tiny random models of every family that the tests know, text, speech and images, made from a config alone.

Hidden 32, 2 layers, 4 heads of width 8, FFN 64. Weights are large enough that every unit matters.
"""

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

SPECIAL = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WIDE = {"initializer_range": 0.2}
TEXT = {**SPECIAL, **SIZES, **WIDE, "max_position_embeddings": 64}
SMALL = {"embedding_size": 16}
GPT = {**SPECIAL, **WIDE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEAD = {**GROUPED, "head_dim": 8}  # where the config would not derive it
GEMMA = {**HEAD, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
T5 = {**SPECIAL, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **{**SPECIAL, "init_std": 0.2, "d_model": 32, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "begin_suppress_tokens": None}
IMAGE = {**SIZES, **WIDE, "image_size": 32, "patch_size": 8}
SWIN = {**WIDE, "image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
SPEECH = {
    **{**SPECIAL, **SIZES, **WIDE, "conv_dim": [32, 32], "conv_kernel": [4, 3], "conv_stride": [2, 2]},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16},
}
SPECTROGRAM = {
    **{**SIZES, **WIDE, "max_length": 24, "num_mel_bins": 16},
    **{"patch_size": 4, "frequency_stride": 4, "time_stride": 4},
}
TOWERS = {
    "text_config": {**TEXT, "projection_dim": 32, "projection_size": 32, "initializer_factor": 2.0},
    "vision_config": {**IMAGE, "projection_dim": 32, "initializer_factor": 2.0},
}
CLASSIFIER, CAUSAL, SEQ2SEQ = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
IMAGES, CTC = "AutoModelForImageClassification", "AutoModelForCTC"
MASKED, TOKENS, ANSWERS = "AutoModelForMaskedLM", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"

FAMILIES = {  # name -> model type, fields of its config, and the Auto class that it is built with
    "bert": ("bert", TEXT, CLASSIFIER),
    "roberta": ("roberta", TEXT, CLASSIFIER),
    "xlm-roberta": ("xlm-roberta", TEXT, CLASSIFIER),
    "camembert": ("camembert", TEXT, CLASSIFIER),
    "distilbert": ("distilbert", {**TEXT, "hidden_dim": 64}, CLASSIFIER),
    "electra": ("electra", {**TEXT, **SMALL}, CLASSIFIER),
    "albert": ("albert", {**TEXT, **SMALL}, CLASSIFIER),  # two passes of one layer
    "deberta-v2": ("deberta-v2", {**TEXT, **DEBERTA, "norm_rel_ebd": "layer_norm"}, CLASSIFIER),
    "modernbert": (
        "modernbert",
        {**TEXT, "local_attention": 8, "layer_types": ["full_attention", "sliding_attention"], "cls_token_id": 1}
        | {"sep_token_id": 2, "initializer_cutoff_factor": 3.0},
        CLASSIFIER,
    ),
    "mpnet": ("mpnet", TEXT, CLASSIFIER),
    "convbert": ("convbert", {**TEXT, "embedding_size": 32, "conv_kernel_size": 3}, CLASSIFIER),
    "nystromformer": ("nystromformer", {**TEXT, "conv_kernel_size": 5}, CLASSIFIER),
    "squeezebert": ("squeezebert", {**TEXT, "embedding_size": 32}, CLASSIFIER),
    "xlnet": ("xlnet", {**SPECIAL, **WIDE, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, CLASSIFIER),
    "gpt2": ("gpt2", GPT, CAUSAL),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}, CAUSAL),
    "gpt_bigcode": ("gpt_bigcode", GPT, CAUSAL),
    "opt": ("opt", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}, CAUSAL),
    "gpt_neox": ("gpt_neox", TEXT, CAUSAL),
    "bloom": ("bloom", {**SPECIAL, **WIDE, "hidden_size": 32, "n_layer": 2, "n_head": 4}, CAUSAL),
    "falcon": ("falcon", {**TEXT, "ffn_hidden_size": 64}, CAUSAL),
    "llama": ("llama", GROUPED, CAUSAL),
    "llama_mqa": ("llama", {**GROUPED, "num_key_value_heads": 1}, CAUSAL),
    "mistral": ("mistral", HEAD, CAUSAL),
    "qwen2": ("qwen2", GROUPED, CAUSAL),
    "qwen3": ("qwen3", HEAD, CAUSAL),
    "gemma": ("gemma", HEAD, CAUSAL),
    "gemma2": ("gemma2", GEMMA, CAUSAL),
    "gemma3_text": ("gemma3_text", GEMMA, CAUSAL),
    "phi": ("phi", GROUPED, CAUSAL),
    "phi3": ("phi3", GROUPED, CAUSAL),
    "olmo": ("olmo", GROUPED, CAUSAL),
    "olmo2": ("olmo2", GROUPED, CAUSAL),
    "stablelm": ("stablelm", GROUPED, CAUSAL),
    "cohere": ("cohere", {**GROUPED, "logit_scale": 1.0}, CAUSAL),
    "starcoder2": ("starcoder2", GROUPED, CAUSAL),
    "mixtral": ("mixtral", {**HEAD, **EXPERTS}, CAUSAL),
    "qwen2_moe": ("qwen2_moe", {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}, CAUSAL),
    "qwen3_moe": ("qwen3_moe", {**HEAD, **EXPERTS}, CAUSAL),
    "t5": ("t5", T5, SEQ2SEQ),
    "mt5": ("mt5", T5, SEQ2SEQ),
    "bart": ("bart", BART, SEQ2SEQ),
    "mbart": ("mbart", BART, SEQ2SEQ),
    "marian": ("marian", {**BART, "decoder_vocab_size": 200}, SEQ2SEQ),
    "pegasus": ("pegasus", BART, SEQ2SEQ),
    "whisper": ("whisper", WHISPER, "AutoModelForSpeechSeq2Seq"),
    "vit": ("vit", IMAGE, IMAGES),
    "deit": ("deit", {**IMAGE, "architectures": ["DeiTForImageClassification"]}, IMAGES),
    "beit": ("beit", {**IMAGE, "use_relative_position_bias": True, "layer_scale_init_value": 1.0}, IMAGES),
    "dinov2": ("dinov2", {**IMAGE, "mlp_ratio": 2}, IMAGES),
    "swin": ("swin", SWIN, IMAGES),
    "siglip": ("siglip", TOWERS, "AutoModel"),
    "clip": ("clip", {**TOWERS, "projection_dim": 32, "initializer_factor": 2.0}, "AutoModel"),
    "wav2vec2": ("wav2vec2", SPEECH, CTC),
    "hubert": ("hubert", SPEECH, CTC),
    "data2vec-audio": ("data2vec-audio", {**SPEECH, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}, CTC),
    "ast": ("audio-spectrogram-transformer", SPECTROGRAM, "AutoModelForAudioClassification"),
}
# Those to which transformers refuses "sdpa".
EAGER_ONLY = {"deberta-v2", "mpnet", "convbert", "nystromformer", "squeezebert", "xlnet", "gptj", "bloom", "gemma2"}
HEADS = {  # name -> other Auto classes
    "bert": (MASKED, TOKENS, ANSWERS, "AutoModelForNextSentencePrediction", "AutoModelForPreTraining", "AutoModel"),
    "roberta": (MASKED, TOKENS, ANSWERS),
    "distilbert": (MASKED, TOKENS, ANSWERS),
    "electra": (MASKED, "AutoModelForPreTraining", TOKENS),
    "albert": (MASKED, "AutoModelForPreTraining", ANSWERS),
    "deberta-v2": (MASKED, TOKENS, ANSWERS),
    "modernbert": (MASKED, TOKENS, ANSWERS),
    "xlnet": (ANSWERS, TOKENS),
    "gpt2": (CLASSIFIER, TOKENS, ANSWERS, "AutoModel"),
    "llama": (CLASSIFIER, TOKENS, ANSWERS, "AutoModel"),
    "qwen3_moe": (CLASSIFIER, TOKENS),
    "t5": (CLASSIFIER, TOKENS, ANSWERS, "AutoModel", "AutoModelForTextEncoding"),
    "bart": (CLASSIFIER, ANSWERS, CAUSAL, "AutoModel"),
    "whisper": ("AutoModelForAudioClassification", "AutoModel"),
    "vit": ("AutoModelForMaskedImageModeling", "AutoModel"),
    "beit": ("AutoModel",),
    "swin": ("AutoModelForMaskedImageModeling", "AutoBackbone", "AutoModel"),
    "dinov2": ("AutoBackbone", "AutoModel"),
    "siglip": (IMAGES,),
    "clip": (IMAGES,),
    "wav2vec2": ("AutoModelForAudioClassification", "AutoModelForPreTraining", "AutoModel"),
}


def build(
    name: str, attention: str | None = "eager", auto: str | None = None, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random model in eval mode.

    Args:
        name: A key of FAMILIES.
        attention: "eager" or "sdpa"; None: what transformers chooses.
        auto: An Auto class; default: that of the family.
        seed: For the weights.
        changes: Fields of the config, under the config's own names.
    """
    kind, fields, default = FAMILIES[name]
    auto = auto or default
    labels = 2 if auto == ANSWERS else 3  # a start and an end
    config = AutoConfig.for_model(kind, **{"num_labels": labels, **fields, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config, attn_implementation=attention)
    disturb_constants(model)
    return model.eval()


@torch.no_grad()
def disturb_constants(model: PreTrainedModel) -> None:
    """Add noise to every parameter that starts as a constant, such as biases, norms and tables of relative positions.

    A test would not see such a part go, or be cut in the wrong place.
    """
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter += 0.2 * torch.randn_like(parameter)
