"""The models, by name."""

from flax import nnx

from mmjax.models.altclip import AltCLIP, AltCLIPConfig, AltText, AltTextConfig
from mmjax.models.bert import Bert, BertConfig
from mmjax.models.clip import CLIP, CLIPConfig
from mmjax.models.emu3_vq import Emu3VQ, Emu3VQConfig
from mmjax.models.flamingo import Flamingo, FlamingoConfig
from mmjax.models.janus import Janus, JanusConfig
from mmjax.models.lm import LM, LMConfig, LMOutput
from mmjax.models.mllama import Mllama, MllamaConfig
from mmjax.models.naflex import NaFlexConfig, NaFlexViT
from mmjax.models.projection import ProjectionConfig
from mmjax.models.siglip import NaFlexSigLIP, NaFlexSigLIPConfig, SigLIP, SigLIPConfig
from mmjax.models.sizes import text_size, vit_size
from mmjax.models.t5 import T5, T5Config, T5Encoder, T5EncoderConfig
from mmjax.models.text import TextConfig, TextOutput, TextTransformer
from mmjax.models.tiled_vit import TiledViT, TiledViTConfig
from mmjax.models.tokenizer_trainer import TokenizerTrainer, TokenizerTrainerConfig
from mmjax.models.unified import Unified, UnifiedConfig, UnifiedOutput
from mmjax.models.vit import ViT, ViTConfig, ViTOutput
from mmjax.models.vlm import VLM, Seq2SeqVLM, Seq2SeqVLMConfig, VLMConfig, VLMOutput
from mmjax.models.vqgan import VQGAN, VQGANConfig, VQGANOutput
from mmjax.registry import Registry

# name -> (the dataclass of its config, the module built from one)
MODELS: Registry[tuple[type, type[nnx.Module]]] = Registry("model")
MODELS.register("vit")((ViTConfig, ViT))
MODELS.register("text")((TextConfig, TextTransformer))
MODELS.register("clip")((CLIPConfig, CLIP))
MODELS.register("siglip")((SigLIPConfig, SigLIP))
MODELS.register("naflex_vit")((NaFlexConfig, NaFlexViT))
MODELS.register("naflex_siglip")((NaFlexSigLIPConfig, NaFlexSigLIP))
MODELS.register("lm")((LMConfig, LM))
MODELS.register("bert")((BertConfig, Bert))
MODELS.register("alt_text")((AltTextConfig, AltText))
MODELS.register("altclip")((AltCLIPConfig, AltCLIP))
MODELS.register("t5")((T5Config, T5))
MODELS.register("t5_encoder")((T5EncoderConfig, T5Encoder))
MODELS.register("vlm")((VLMConfig, VLM))
MODELS.register("flamingo")((FlamingoConfig, Flamingo))
MODELS.register("mllama")((MllamaConfig, Mllama))
MODELS.register("seq2seq_vlm")((Seq2SeqVLMConfig, Seq2SeqVLM))
MODELS.register("vqgan")((VQGANConfig, VQGAN))
MODELS.register("tokenizer_trainer")((TokenizerTrainerConfig, TokenizerTrainer))
MODELS.register("unified")((UnifiedConfig, Unified))
MODELS.register("janus")((JanusConfig, Janus))
MODELS.register("emu3_vq")((Emu3VQConfig, Emu3VQ))

__all__ = [
    "CLIP",
    "LM",
    "MODELS",
    "T5",
    "VLM",
    "VQGAN",
    "AltCLIP",
    "AltCLIPConfig",
    "AltText",
    "AltTextConfig",
    "Bert",
    "BertConfig",
    "CLIPConfig",
    "Emu3VQ",
    "Emu3VQConfig",
    "Flamingo",
    "FlamingoConfig",
    "Janus",
    "JanusConfig",
    "LMConfig",
    "LMOutput",
    "Mllama",
    "MllamaConfig",
    "NaFlexConfig",
    "NaFlexSigLIP",
    "NaFlexSigLIPConfig",
    "NaFlexViT",
    "ProjectionConfig",
    "Seq2SeqVLM",
    "Seq2SeqVLMConfig",
    "SigLIP",
    "SigLIPConfig",
    "T5Config",
    "T5Encoder",
    "T5EncoderConfig",
    "TextConfig",
    "TextOutput",
    "TextTransformer",
    "TiledViT",
    "TiledViTConfig",
    "TokenizerTrainer",
    "TokenizerTrainerConfig",
    "Unified",
    "UnifiedConfig",
    "UnifiedOutput",
    "VLMConfig",
    "VLMOutput",
    "VQGANConfig",
    "VQGANOutput",
    "ViT",
    "ViTConfig",
    "ViTOutput",
    "text_size",
    "vit_size",
]
