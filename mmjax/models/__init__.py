"""The models, by name."""

from flax import nnx

from mmjax.models.clip import CLIP, CLIPConfig
from mmjax.models.lm import LM, LMConfig, LMOutput
from mmjax.models.naflex import NaFlexConfig, NaFlexViT
from mmjax.models.projection import ProjectionConfig
from mmjax.models.siglip import NaFlexSigLIP, NaFlexSigLIPConfig, SigLIP, SigLIPConfig
from mmjax.models.sizes import text_size, vit_size
from mmjax.models.text import TextConfig, TextOutput, TextTransformer
from mmjax.models.vit import ViT, ViTConfig, ViTOutput
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

__all__ = [
    "CLIP",
    "LM",
    "MODELS",
    "CLIPConfig",
    "LMConfig",
    "LMOutput",
    "NaFlexConfig",
    "NaFlexSigLIP",
    "NaFlexSigLIPConfig",
    "NaFlexViT",
    "ProjectionConfig",
    "SigLIP",
    "SigLIPConfig",
    "TextConfig",
    "TextOutput",
    "TextTransformer",
    "ViT",
    "ViTConfig",
    "ViTOutput",
    "text_size",
    "vit_size",
]
