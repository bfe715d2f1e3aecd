"""Model families: how to build a tiny one on the meta device, and what each of its weights is for.

The classes are those of transformers and diffusers; the roles were assigned by hand, from their source.
"""

from __future__ import annotations

from typing import Any


def names(prefix: str, ends: str) -> list[str]:
    return [prefix + end for end in ends.split()]


Roles = dict[str, list[str]]
SIZES: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TEXT: dict[str, Any] = dict(SIZES, vocab_size=64, num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
MOE: dict[str, Any] = dict(TEXT, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
LM: Roles = {
    "attn": names("model.layers.N.self_attn.", "q_proj k_proj v_proj o_proj"),
    "mlp": names("model.layers.N.mlp.", "gate_proj up_proj down_proj"),
    "embedding": ["model.embed_tokens"],
    "head": ["lm_head"],
}
EXPERTS = LM | {"mlp": names("model.layers.N.mlp.experts.", "gate_up_proj down_proj")}
EXPERTS["router"] = ["model.layers.N.mlp.gate"]
CLIP: Roles = {
    "attn": names("encoder.layers.N.self_attn.", "q_proj k_proj v_proj out_proj"),
    "mlp": ["encoder.layers.N.mlp.fcN"],
    "conv": ["embeddings.patch_embedding"],
    "embedding": ["embeddings.position_embedding"],
}
JOINT = names("transformer_blocks.N.attn.", "to_q to_k to_v to_out.N add_q_proj add_k_proj add_v_proj to_add_out")
NORMS = [*names("transformer_blocks.N.", "normN.linear normN_context.linear"), "norm_out.linear"]
UNET = ("down_blocks.N", "mid_block", "up_blocks.N")
DIFFUSION: dict[str, Any] = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)

# family -> (library, class, configuration, roles); paths with N for numbers
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Roles]] = {
    "llama": ("transformers", "LlamaForCausalLM", TEXT, LM),
    "qwen3": ("transformers", "Qwen3ForCausalLM", TEXT | {"head_dim": 16}, LM),
    "gemma3": ("transformers", "Gemma3ForCausalLM", TEXT | {"head_dim": 16}, LM),
    "mixtral": ("transformers", "MixtralForCausalLM", TEXT | {"num_local_experts": 4}, EXPERTS),
    "qwen3_moe": ("transformers", "Qwen3MoeForCausalLM", MOE | {"decoder_sparse_step": 1}, EXPERTS),
    "qwen2_moe": (
        "transformers",
        "Qwen2MoeForCausalLM",
        MOE | {"shared_expert_intermediate_size": 32},
        EXPERTS
        | {
            "mlp": EXPERTS["mlp"] + names("model.layers.N.mlp.shared_expert.", "gate_proj up_proj down_proj"),
            "router": names("model.layers.N.mlp.", "gate shared_expert_gate"),
        },
    ),
    "deepseek_v3": (
        "transformers",
        "DeepseekV3ForCausalLM",
        {key: value for key, value in MOE.items() if key != "num_experts"}
        | dict(n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16)
        | dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
        EXPERTS
        | {
            "attn": names("model.layers.N.self_attn.", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"),
            "mlp": EXPERTS["mlp"]
            + LM["mlp"]
            + names("model.layers.N.mlp.shared_experts.", "gate_proj up_proj down_proj"),
        },
    ),
    "gpt_oss": (
        "transformers",
        "GptOssForCausalLM",
        TEXT | {"num_local_experts": 4, "head_dim": 16},
        EXPERTS | {"router": ["model.layers.N.mlp.router"]},
    ),
    "llama4": (
        "transformers",
        "Llama4ForCausalLM",
        TEXT | {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 64},
        LM
        | {
            "mlp": names("model.layers.N.feed_forward.", "experts.gate_up_proj experts.down_proj")
            + names("model.layers.N.feed_forward.shared_expert.", "gate_proj up_proj down_proj"),
            "router": ["model.layers.N.feed_forward.router"],
        },
    ),
    "gpt2": (
        "transformers",
        "GPT2LMHeadModel",
        dict(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0),
        {
            "attn": names("transformer.h.N.attn.", "c_attn c_proj"),
            "mlp": names("transformer.h.N.mlp.", "c_fc c_proj"),
            "embedding": names("transformer.", "wte wpe"),
            "head": ["lm_head"],
        },
    ),
    "gpt_neox": (
        "transformers",
        "GPTNeoXForCausalLM",
        SIZES | {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0},
        {
            "attn": names("gpt_neox.layers.N.attention.", "query_key_value dense"),
            "mlp": names("gpt_neox.layers.N.mlp.", "dense_h_to_Nh dense_Nh_to_h"),
            "embedding": ["gpt_neox.embed_in"],
            "head": ["lm_head"],
        },
    ),
    "bert": (
        "transformers",
        "BertForMaskedLM",
        SIZES | {"vocab_size": 64},
        {
            "attn": names("bert.encoder.layer.N.attention.", "self.query self.key self.value output.dense"),
            "mlp": names("bert.encoder.layer.N.", "intermediate.dense output.dense"),
            "embedding": names("bert.embeddings.", "word_embeddings position_embeddings token_type_embeddings"),
            "head": names("cls.predictions.", "transform.dense decoder"),
        },
    ),
    "distilbert": (
        "transformers",
        "DistilBertModel",
        dict(dim=32, hidden_dim=64, n_layers=1, n_heads=2, vocab_size=64),
        {
            "attn": names("transformer.layer.N.attention.", "q_lin k_lin v_lin out_lin"),
            "mlp": ["transformer.layer.N.ffn.linN"],
            "embedding": names("embeddings.", "word_embeddings position_embeddings"),
        },
    ),
    "t5": (
        "transformers",
        "T5EncoderModel",
        dict(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2),
        {
            "attn": names("encoder.block.N.layer.N.SelfAttention.", "q k v o"),
            "mlp": names("encoder.block.N.layer.N.DenseReluDense.", "wi wo"),
            "embedding": [
                "shared",
                "encoder.embed_tokens",
                "encoder.block.N.layer.N.SelfAttention.relative_attention_bias",
            ],
        },
    ),
    "whisper": (
        "transformers",
        "WhisperForConditionalGeneration",
        dict(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0)
        | dict(decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, bos_token_id=0, eos_token_id=0)
        | dict(decoder_start_token_id=0, begin_suppress_tokens=None),
        {
            "attn": names("model.encoder.layers.N.self_attn.", "q_proj k_proj v_proj out_proj")
            + names("model.decoder.layers.N.self_attn.", "q_proj k_proj v_proj out_proj")
            + names("model.decoder.layers.N.encoder_attn.", "q_proj k_proj v_proj out_proj"),
            "mlp": ["model.encoder.layers.N.fcN", "model.decoder.layers.N.fcN"],
            "conv": ["model.encoder.convN"],
            "embedding": ["model.encoder.embed_positions", "model.decoder.embed_tokens"],
            "head": ["proj_out"],
        },
    ),
    "swin": (
        "transformers",
        "SwinForImageClassification",
        dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=32, patch_size=4, window_size=4),
        {
            "attn": names("swin.encoder.layers.N.blocks.N.attention.", "q_proj k_proj v_proj o_proj"),
            "mlp": ["swin.encoder.layers.N.blocks.N.mlp.fcN"],
            "other": ["swin.encoder.layers.N.downsample.reduction"],
            "conv": ["swin.embeddings.patch_embeddings.projection"],
            "head": ["classifier"],
        },
    ),
    "vit": (
        "transformers",
        "ViTForImageClassification",
        SIZES,
        {
            "attn": names("vit.layers.N.attention.", "q_proj k_proj v_proj o_proj"),
            "mlp": ["vit.layers.N.mlp.fcN"],
            "conv": ["vit.embeddings.patch_embeddings.projection"],
            "head": ["classifier"],
        },
    ),
    "clip_vision": ("transformers", "CLIPVisionModel", SIZES, CLIP),
    "siglip_vision": (
        "transformers",
        "SiglipVisionModel",
        SIZES,
        CLIP | {"head": names("head.", "attention.in_proj attention.out_proj mlp.fcN")},
    ),
    "clip": (
        "transformers",
        "CLIPModel",
        dict(text_config=dict(SIZES, vocab_size=64), vision_config=SIZES),
        {
            role: [f"{tower}_model.{path}" for tower in ("text", "vision") for path in paths]
            for role, paths in CLIP.items()
        }
        | {
            "conv": ["vision_model.embeddings.patch_embedding"],
            "embedding": [
                *names("text_model.embeddings.", "token_embedding position_embedding"),
                "vision_model.embeddings.position_embedding",
            ],
            "other": ["visual_projection", "text_projection"],
        },
    ),
    "llava": (
        "transformers",
        "LlavaForConditionalGeneration",
        dict(text_config=TEXT | {"model_type": "llama"}, vision_config=SIZES | {"model_type": "clip_vision_model"}),
        {role: [path.replace("model.", "model.language_model.") for path in paths] for role, paths in LM.items()}
        | {
            "tower": [f"model.vision_tower.{path}" for role in ("attn", "mlp", "conv") for path in CLIP[role]]
            + ["model.multi_modal_projector.linear_N"],
            "embedding": ["model.language_model.embed_tokens", "model.vision_tower.embeddings.position_embedding"],
        },
    ),
    "qwen3_vl": (
        "transformers",
        "Qwen3VLForConditionalGeneration",
        dict(
            text_config=TEXT | {"head_dim": 16},
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32)
            | {"deepstack_visual_indexes": [0]},
        ),
        {role: [path.replace("model.", "model.language_model.") for path in paths] for role, paths in LM.items()}
        | {
            "tower": names("model.visual.", "patch_embed.proj blocks.N.attn.qkv blocks.N.attn.proj")
            + names("model.visual.", "blocks.N.mlp.linear_fcN merger.linear_fcN deepstack_merger_list.N.linear_fcN"),
            "embedding": ["model.language_model.embed_tokens", "model.visual.pos_embed"],
        },
    ),
    "flux": (
        "diffusers",
        "FluxTransformer2DModel",
        DIFFUSION
        | {"num_single_layers": 1, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        {
            "attn": JOINT + names("single_transformer_blocks.N.attn.", "to_q to_k to_v"),
            "mlp": [
                *names("transformer_blocks.N.", "ff.net.N.proj ff.net.N ff_context.net.N.proj ff_context.net.N"),
                "single_transformer_blocks.N.proj_mlp",
            ],
            "other": ["single_transformer_blocks.N.proj_out"],
            "conditioning": [
                *NORMS,
                "single_transformer_blocks.N.norm.linear",
                "context_embedder",
                "x_embedder",
                *names(
                    "time_text_embed.", "timestep_embedder.linear_N guidance_embedder.linear_N text_embedder.linear_N"
                ),
            ],
            "head": ["proj_out"],
        },
    ),
    "flux2": (
        "diffusers",
        "Flux2Transformer2DModel",
        DIFFUSION | {"num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4)},
        {
            "attn": [*JOINT, "single_transformer_blocks.N.attn.to_out"],
            "mlp": names(
                "transformer_blocks.N.", "ff.linear_in ff.linear_out ff_context.linear_in ff_context.linear_out"
            ),
            "other": ["single_transformer_blocks.N.attn.to_qkv_mlp_proj"],
            "conditioning": [
                *names("double_stream_modulation_", "img.linear txt.linear"),
                "single_stream_modulation.linear",
                "x_embedder",
                "context_embedder",
                "norm_out.linear",
                *names("time_guidance_embed.", "timestep_embedder.linear_N guidance_embedder.linear_N"),
            ],
            "head": ["proj_out"],
        },
    ),
    "sd3": (
        "diffusers",
        "SD3Transformer2DModel",
        DIFFUSION
        | dict(sample_size=32, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=16)
        | dict(dual_attention_layers=(0,), qk_norm="rms_norm"),
        {
            "attn": JOINT + names("transformer_blocks.N.attnN.", "to_q to_k to_v to_out.N"),
            "mlp": names("transformer_blocks.N.", "ff.net.N.proj ff.net.N ff_context.net.N.proj ff_context.net.N"),
            "conv": ["pos_embed.proj"],
            "conditioning": [
                *NORMS,
                "context_embedder",
                *names("time_text_embed.", "timestep_embedder.linear_N text_embedder.linear_N"),
            ],
            "head": ["proj_out"],
        },
    ),
    "sdxl": (
        "diffusers",
        "UNet2DConditionModel",
        dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8)
        | dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True)
        | dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time")
        | dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=80, attention_head_dim=8),
        {
            "attn": [
                f"{part}.attentions.N.transformer_blocks.N.attnN.{layer}"
                for part in UNET
                for layer in ("to_q", "to_k", "to_v", "to_out.N")
            ],
            "mlp": [
                f"{part}.attentions.N.transformer_blocks.N.ff.{layer}"
                for part in UNET
                for layer in ("net.N.proj", "net.N")
            ],
            "other": [f"{part}.attentions.N.{layer}" for part in UNET for layer in ("proj_in", "proj_out")],
            "conv": [
                *names("", "conv_in conv_out down_blocks.N.downsamplers.N.conv up_blocks.N.upsamplers.N.conv"),
                *names("down_blocks.N.resnets.N.", "convN conv_shortcut"),
                *names("up_blocks.N.resnets.N.", "convN conv_shortcut"),
                "mid_block.resnets.N.convN",
            ],
            "conditioning": [
                *names("", "time_embedding.linear_N add_embedding.linear_N"),
                *(f"{part}.resnets.N.time_emb_proj" for part in UNET),
            ],
        },
    ),
    "cogvideox": (
        "diffusers",
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1)
        | dict(
            text_embed_dim=32, time_embed_dim=32, sample_width=8, sample_height=8, sample_frames=5, ofs_embed_dim=32
        ),
        {
            "attn": names("transformer_blocks.N.attnN.", "to_q to_k to_v to_out.N"),
            "mlp": names("transformer_blocks.N.ff.", "net.N.proj net.N"),
            "other": ["patch_embed.text_proj"],
            "conv": ["patch_embed.proj"],
            "conditioning": [
                *names("", "time_embedding.linear_N ofs_embedding.linear_N norm_out.linear"),
                "transformer_blocks.N.normN.linear",
            ],
            "head": ["proj_out"],
        },
    ),
    "dit": (
        "diffusers",
        "DiTTransformer2DModel",
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8)
        | dict(norm_num_groups=8),
        {
            "attn": names("transformer_blocks.N.attnN.", "to_q to_k to_v to_out.N"),
            "mlp": names("transformer_blocks.N.ff.", "net.N.proj net.N"),
            "conv": ["pos_embed.proj"],
            "conditioning": names("transformer_blocks.N.normN.", "emb.timestep_embedder.linear_N linear"),
            "embedding": ["transformer_blocks.N.normN.emb.class_embedder.embedding_table"],
            "head": ["proj_out_N"],
        },
    ),
    "stable-audio": (
        "diffusers",
        "StableAudioDiTModel",
        dict(sample_size=8, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, out_channels=4)
        | dict(num_key_value_attention_heads=1, cross_attention_dim=16, cross_attention_input_dim=16)
        | dict(time_proj_dim=16, global_states_input_dim=32),
        {
            "attn": names("transformer_blocks.N.attnN.", "to_q to_k to_v to_out.N"),
            "mlp": names("transformer_blocks.N.ff.", "net.N.proj net.N"),
            "conv": ["preprocess_conv", "postprocess_conv"],
            "other": ["proj_in"],
            "conditioning": names("", "timestep_proj.N global_proj.N cross_attention_proj.N"),
            "head": ["proj_out"],
        },
    ),
}
