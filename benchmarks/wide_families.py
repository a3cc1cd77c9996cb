"""The models of transformers on the wide list: class names by the inputs they take, sizes they need of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Config = dict[str, Any]


def _ids(length: int = 16, batch: int = 2) -> Tensor:
    return torch.randint(3, 98, (batch, length))


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _text() -> Inputs:
    return {"input_ids": _ids(), "attention_mask": _ones(2, 16)}


def _ids_only() -> Inputs:
    return {"input_ids": _ids()}


def _text_to_text() -> Inputs:
    return {
        "input_ids": _ids(), "attention_mask": _ones(2, 16),
        "decoder_input_ids": _ids(8), "decoder_attention_mask": _ones(2, 8),
    }  # fmt: skip


def _image(side: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(2, 3, side, side)}


def _video(name: str = "pixel_values") -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(2, 4, 3, 32, 32)}


def _wave(length: int = 800, **more: int) -> Callable[[], Inputs]:
    return lambda: {"input_values": torch.randn(2, length), **{name: _ids(count) for name, count in more.items()}}


def _text_and_image() -> Inputs:
    return {**_text(), "pixel_values": torch.randn(2, 3, 32, 32)}


def _image_in_text(places: int) -> Callable[[], Inputs]:
    """A text whose first ``places`` tokens stand for the image."""
    return lambda: {
        "pixel_values": torch.randn(2, 3, 32, 32), "attention_mask": _ones(2, places + 4),
        "input_ids": torch.cat([torch.full((2, places), IMAGE_TOKEN), _ids(4)], 1),
    }  # fmt: skip


def _series() -> Inputs:
    return {"past_values": torch.randn(2, 16, 2)}


IMAGE_TOKEN = 99

_TEXT = """
BertGenerationDecoder BigBirdForSequenceClassification CamembertForSequenceClassification
ConvBertForSequenceClassification DebertaForSequenceClassification ErnieForSequenceClassification
EsmForSequenceClassification FlaubertForSequenceClassification FunnelForSequenceClassification
IBertForSequenceClassification LayoutLMForSequenceClassification LiltForSequenceClassification LukeForMaskedLM
MarkupLMForSequenceClassification MobileBertForSequenceClassification ModernBertForSequenceClassification
NomicBertForSequenceClassification NystromformerForSequenceClassification RemBertForSequenceClassification
RoCBertForSequenceClassification RoFormerForSequenceClassification SqueezeBertForSequenceClassification
TapasForSequenceClassification XLMForSequenceClassification XLMRobertaXLForSequenceClassification
XLNetForSequenceClassification XmodForSequenceClassification YosoForSequenceClassification
EuroBertForSequenceClassification
GPTJForCausalLM CodeGenForCausalLM GPTBigCodeForCausalLM GPTNeoForCausalLM CTRLLMHeadModel OpenAIGPTLMHeadModel
OlmoForCausalLM Olmo2ForCausalLM OlmoeForCausalLM CohereForCausalLM Cohere2ForCausalLM Starcoder2ForCausalLM
StableLmForCausalLM PersimmonForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
GemmaForCausalLM Gemma3ForCausalLM Gemma3nForCausalLM PhiForCausalLM PhimoeForCausalLM MptForCausalLM
JambaForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM
Qwen3NextForCausalLM GlmForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM NemotronForCausalLM
RecurrentGemmaForCausalLM HeliumForCausalLM Exaone4ForCausalLM BambaForCausalLM Lfm2ForCausalLM BioGptForCausalLM
GptOssForCausalLM ApertusForCausalLM SmolLM3ForCausalLM MiniMaxForCausalLM DiffLlamaForCausalLM DogeForCausalLM
MoshiForCausalLM Llama4ForCausalLM JetMoeForCausalLM BitNetForCausalLM FlexOlmoForCausalLM Dots1ForCausalLM
FalconH1ForCausalLM NemotronHForCausalLM Qwen3_5ForCausalLM ModernBertDecoderForCausalLM CLIPTextModelWithProjection
""".split()
_IDS_ONLY = """
FNetForSequenceClassification Mamba2ForCausalLM FalconMambaForCausalLM RwkvForCausalLM xLSTMForCausalLM
ReformerModelWithLMHead TrOCRForCausalLM VitsModel
""".split()
_TEXT_TO_TEXT = """
PegasusForConditionalGeneration PegasusXForConditionalGeneration BigBirdPegasusForConditionalGeneration
MBartForConditionalGeneration M2M100ForConditionalGeneration MarianMTModel
MT5ForConditionalGeneration UMT5ForConditionalGeneration LongT5ForConditionalGeneration
SwitchTransformersForConditionalGeneration NllbMoeForConditionalGeneration LEDForConditionalGeneration
""".split()
_IMAGE = {
    32: """Dinov2ForImageClassification BeitForImageClassification DeiTForImageClassification
    SwinForImageClassification Swinv2ForImageClassification SiglipForImageClassification DINOv3ViTModel
    YolosForObjectDetection Swin2SRForImageSuperResolution MgpstrForSceneTextRecognition DPTForDepthEstimation
    ZoeDepthForDepthEstimation""".split(),
    64: """PoolFormerForImageClassification RegNetForImageClassification ResNetForImageClassification
    LevitForImageClassification PvtForImageClassification PvtV2ForImageClassification
    FocalNetForImageClassification ConvNextV2ForImageClassification SegformerForSemanticSegmentation
    MobileViTForImageClassification MobileNetV1ForImageClassification BitForImageClassification
    SwiftFormerForImageClassification PPLCNetForImageClassification UperNetForSemanticSegmentation
    DetrForObjectDetection ConditionalDetrForObjectDetection DeformableDetrForObjectDetection
    RTDetrForObjectDetection MaskFormerForInstanceSegmentation Mask2FormerForUniversalSegmentation
    SuperPointForKeypointDetection""".split(),
}
_WAVE = "HubertForCTC WavLMForCTC SEWForCTC SEWDForCTC UniSpeechSatForCTC Wav2Vec2ConformerForCTC".split()
_TEXT_AND_IMAGE = """
GroupViTModel AltCLIPModel SiglipModel CLIPSegForImageSegmentation BlipForImageTextRetrieval FlavaModel
BridgeTowerForImageAndTextRetrieval
""".split()
_OTHERS: dict[str, Callable[[], Inputs]] = {
    "SpeechT5ForSpeechToText": _wave(decoder_input_ids=8),
    "MoonshineForConditionalGeneration": _wave(2000, decoder_input_ids=8),
    "Wav2Vec2ForXVector": _wave(1600),
    "ProphetNetForConditionalGeneration": lambda: {"input_ids": _ids(), "decoder_input_ids": _ids(8)},
    "DacModel": lambda: {"input_values": torch.randn(1, 1, 640)},
    "VideoMAEForVideoClassification": _video(),
    "VJEPA2ForVideoClassification": _video("pixel_values_videos"),
    "PatchTSTForPrediction": _series,
    "PatchTSMixerForPrediction": _series,
    "LlavaForConditionalGeneration": _image_in_text(16),
    "PaliGemmaForConditionalGeneration": lambda: {**_image_in_text(16)(), "token_type_ids": torch.zeros_like(_ids(20))},
    "Gemma3ForConditionalGeneration": lambda: {**_image_in_text(4)(), "token_type_ids": torch.zeros_like(_ids(8))},
    "Blip2ForConditionalGeneration": _image_in_text(4),
    "PerceiverForSequenceClassification": lambda: {"inputs": _ids(), "attention_mask": _ones(2, 16)},
    "Siglip2VisionModel": lambda: {
        "pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": _ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "Idefics3ForConditionalGeneration": lambda: {
        **_image_in_text(4)(), "pixel_values": torch.randn(2, 1, 3, 32, 32),
    },
    "GroundingDinoForObjectDetection": lambda: {
        **_text(), "pixel_values": torch.randn(2, 3, 64, 64), "token_type_ids": torch.zeros_like(_ids()),
    },
}  # fmt: skip
INPUTS: dict[str, Callable[[], Inputs]] = {
    **dict.fromkeys(_TEXT, _text), **dict.fromkeys(_IDS_ONLY, _ids_only),
    **dict.fromkeys(_TEXT_TO_TEXT, _text_to_text),
    **{name: _image(side) for side, group in _IMAGE.items() for name in group},
    **dict.fromkeys(_WAVE, _wave()), **dict.fromkeys(_TEXT_AND_IMAGE, _text_and_image), **_OTHERS,
}  # fmt: skip
"""What each model is called with, by its class name."""

_VISION = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
)
_LANGUAGE = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=101,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_DECODER = dict(_LANGUAGE, num_key_value_heads=2)
_CLIP = dict(text_config=_LANGUAGE, vision_config=_VISION, projection_dim=32)
_RESNET = dict(model_type="resnet", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], embedding_size=8)
_SWIN = dict(
    model_type="swin", embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4, image_size=64,
    patch_size=4,
)  # fmt: skip
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_SMALL_SWIN = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, image_size=32, patch_size=4)
_PYRAMID = dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
_DETR = dict(use_timm_backbone=False, backbone=None, use_pretrained_backbone=False)
_LATENT = dict(
    num_key_value_heads=4, moe_intermediate_size=48, n_routed_experts=4, n_group=2, qk_rope_head_dim=8, head_dim=None
)
_SERIES = dict(num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, prediction_length=4)
_WAVES = dict(conv_dim=(32, 32, 32), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), vocab_size=32)

CONFIGS: dict[str, Config] = {
    "LiltForSequenceClassification": dict(hidden_size=96),
    "SqueezeBertForSequenceClassification": dict(embedding_size=64),
    "XmodForSequenceClassification": dict(languages=["en_XX"], default_language="en_XX"),
    "RoCBertForSequenceClassification": dict(
        pronunciation_vocab_size=50, shape_vocab_size=50, shape_embed_dim=32, pronunciation_embed_dim=32
    ),
    "ReformerModelWithLMHead": dict(
        is_decoder=True, axial_pos_embds=False, attn_layers=["local", "local"], attention_head_size=16,
        feed_forward_size=128, local_attn_chunk_length=8,
    ),
    "PerceiverForSequenceClassification": dict(
        num_latents=8, d_latents=64, d_model=48, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=4,
    ),
    "Mamba2ForCausalLM": dict(num_heads=8, expand=2, n_groups=1, chunk_size=8),
    "FalconH1ForCausalLM": dict(mamba_d_ssm=128, mamba_n_groups=1),
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": _LATENT,
    "VitsModel": dict(
        flow_size=64, spectrogram_bins=33, upsample_initial_channel=32, upsample_rates=[4, 2],
        upsample_kernel_sizes=[8, 4],
    ),
    "PoolFormerForImageClassification": dict(_PYRAMID, depths=[1, 1, 2, 1]),
    "RegNetForImageClassification": dict(
        hidden_sizes=[32, 64, 64, 96], depths=[1, 1, 2, 1], embedding_size=16, groups_width=16
    ),
    "ResNetForImageClassification": dict(hidden_sizes=[32, 64, 64, 96], depths=[1, 1, 2, 1], embedding_size=16),
    "ConvNextV2ForImageClassification": dict(_PYRAMID, depths=[1, 1, 2, 1]),
    "BitForImageClassification": dict(hidden_sizes=[32, 64, 64, 96], depths=[1, 1, 2, 1], num_groups=8),
    "FocalNetForImageClassification": dict(embed_dim=16, depths=[1, 1, 1, 1]),
    "SwinForImageClassification": _SMALL_SWIN,
    "Swinv2ForImageClassification": _SMALL_SWIN,
    "Swin2SRForImageSuperResolution": dict(_SMALL_SWIN, num_heads=[2, 2], patch_size=1),
    "PvtForImageClassification": dict(
        _PYRAMID, image_size=64, num_hidden_layers=4, num_attention_heads=[1, 2, 3, 4], patch_sizes=[4, 2, 2, 2]
    ),
    "LevitForImageClassification": dict(
        hidden_sizes=[32, 64, 96], num_attention_heads=[2, 4, 6], key_dim=[8, 8, 8], depths=[1, 1, 1], image_size=64,
        patch_size=16,
    ),
    "SegformerForSemanticSegmentation": dict(
        _PYRAMID, num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16, num_encoder_blocks=4
    ),
    "DPTForDepthEstimation": dict(
        num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 24, 32, 40],
        fusion_hidden_size=16, is_hybrid=False,
    ),
    "ZoeDepthForDepthEstimation": dict(
        backbone_config=dict(
            _VISION, model_type="beit", num_hidden_layers=4, out_features=_STAGES, reshape_hidden_states=False
        ),
        neck_hidden_sizes=[16, 24, 32, 40], fusion_hidden_size=16, bottleneck_features=16, num_relative_features=8,
        bin_embedding_dim=16, num_attractors=[4, 2, 2, 1], backbone_hidden_size=64, patch_transformer_hidden_size=16,
        patch_transformer_intermediate_size=32,
    ),
    "UperNetForSemanticSegmentation": dict(
        backbone_config=dict(_PYRAMID, model_type="convnext", out_features=_STAGES), hidden_size=16,
        auxiliary_in_channels=48, auxiliary_channels=16, pool_scales=[1, 2], in_channels=[16, 32, 48, 64],
    ),
    "YolosForObjectDetection": dict(image_size=[32, 32], num_detection_tokens=5),
    "MgpstrForSceneTextRecognition": dict(
        image_size=[32, 32], max_token_length=7, num_character_labels=11, num_bpe_labels=23, num_wordpiece_labels=29
    ),
    "DetrForObjectDetection": dict(_DETR, backbone_config=dict(_RESNET, out_features=["stage4"])),
    "ConditionalDetrForObjectDetection": dict(_DETR, backbone_config=dict(_RESNET, out_features=["stage4"])),
    "DeformableDetrForObjectDetection": dict(_DETR, backbone_config=dict(_RESNET, out_features=_STAGES[1:])),
    "RTDetrForObjectDetection": dict(
        backbone_config=dict(_RESNET, model_type="rt_detr_resnet", out_features=_STAGES[1:]), encoder_hidden_dim=32,
        encoder_in_channels=[24, 32, 48], feat_strides=[8, 16, 32], encoder_ffn_dim=64, d_model=32, num_denoising=0,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64,
    ),
    "MaskFormerForInstanceSegmentation": dict(
        backbone_config=dict(_SWIN, out_features=_STAGES), fpn_feature_size=32, mask_feature_size=32,
        decoder_config=dict(
            model_type="detr", d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
        ),
    ),
    "Mask2FormerForUniversalSegmentation": dict(
        backbone_config=dict(_SWIN, out_features=_STAGES), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=64, dim_feedforward=64, encoder_layers=1,
    ),
    "GroundingDinoForObjectDetection": dict(
        backbone_config=dict(_SWIN, out_features=_STAGES[1:]), text_config=dict(_LANGUAGE, model_type="bert"),
        max_text_len=16,
    ),
    **dict.fromkeys((*_WAVE, "SpeechT5ForSpeechToText"), _WAVES),
    "SpeechT5ForSpeechToText": dict(_WAVES, vocab_size=101),
    "Wav2Vec2ForXVector": dict(
        _WAVES, tdnn_dim=(32, 32, 48), tdnn_kernel=(3, 3, 1), tdnn_dilation=(1, 2, 1), xvector_output_dim=24,
        classifier_proj_size=32,
    ),
    "DacModel": dict(
        encoder_hidden_size=8, downsampling_ratios=[2, 4], decoder_hidden_size=32, n_codebooks=2, codebook_size=32,
        codebook_dim=4, upsampling_ratios=[4, 2], hidden_size=32,
    ),
    "VJEPA2ForVideoClassification": dict(
        crop_size=32, frames_per_clip=4, pred_hidden_size=48, pred_num_hidden_layers=1, pred_num_attention_heads=4
    ),
    "PatchTSTForPrediction": _SERIES,
    "PatchTSMixerForPrediction": dict(_SERIES, mode="mix_channel", gated_attn=True, norm_mlp="BatchNorm"),
    "GroupViTModel": dict(
        text_config=_LANGUAGE, projection_dim=32, projection_intermediate_dim=48,
        vision_config=dict(_VISION, depths=[1, 1, 1], num_group_tokens=[8, 4, 0], num_output_groups=[8, 4, 0]),
    ),
    "AltCLIPModel": dict(_CLIP, text_config=dict(_LANGUAGE, project_dim=32, type_vocab_size=1)),
    "SiglipModel": dict(
        text_config=dict(_LANGUAGE, max_position_embeddings=16, projection_size=64), vision_config=_VISION
    ),
    "CLIPSegForImageSegmentation": dict(
        _CLIP, extract_layers=[0, 1], reduce_dim=16, decoder_intermediate_size=32, conditional_layer=0
    ),
    "BlipForImageTextRetrieval": dict(_CLIP, text_config=dict(_LANGUAGE, encoder_hidden_size=64)),
    "FlavaModel": dict(
        text_config=_LANGUAGE, image_config=dict(_VISION, vocab_size=64), hidden_size=64, projection_dim=32,
        multimodal_config=dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128),
    ),
    "BridgeTowerForImageAndTextRetrieval": dict(
        text_config=_LANGUAGE, vision_config=dict(hidden_size=64, num_hidden_layers=3, patch_size=8, image_size=32)
    ),
    "LlavaForConditionalGeneration": dict(
        vision_config=dict(_VISION, model_type="clip_vision_model"), text_config=dict(_DECODER, model_type="llama"),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1, image_seq_length=16,
    ),
    "PaliGemmaForConditionalGeneration": dict(
        vision_config=dict(_VISION, model_type="siglip_vision_model", projection_dim=64), projection_dim=64,
        text_config=dict(_DECODER, model_type="gemma", head_dim=16), image_token_index=IMAGE_TOKEN,
    ),
    "Gemma3ForConditionalGeneration": dict(
        vision_config=dict(_VISION, model_type="siglip_vision_model"), mm_tokens_per_image=4,
        text_config=dict(_DECODER, model_type="gemma3_text", head_dim=16), image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN, boi_token_index=97, eoi_token_index=98,
    ),
    "Idefics3ForConditionalGeneration": dict(
        vision_config=_VISION, text_config=dict(_DECODER, model_type="llama"), image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    ),
    "Blip2ForConditionalGeneration": dict(
        vision_config=_VISION, num_query_tokens=4, image_token_index=IMAGE_TOKEN,
        qformer_config=dict(_LANGUAGE, encoder_hidden_size=64),
        text_config=dict(_LANGUAGE, model_type="opt", ffn_dim=128, word_embed_proj_dim=64),
    ),
    "Siglip2VisionModel": dict(num_patches=16),
}  # fmt: skip
"""What the configuration of a model needs besides the common sizes; None leaves its own default."""

ATTRIBUTES: dict[str, dict[str, Any]] = {"VitsModel": {"noise_scale": 0.0, "noise_scale_duration": 0.0}}
"""What is set on a model once it is made: a model that draws random numbers is made to draw none."""
