"""Drop-in `torch.nn` modules that run on the kernels of this package."""

from mmkernels.modules.attention import MultiheadAttention
from mmkernels.modules.audio_patch_embed import AudioPatchEmbed
from mmkernels.modules.patch_embed import PatchEmbed, PatchEmbedWithSize
from mmkernels.modules.tubelet_embed import TubeletEmbed
from mmkernels.modules.vision_embeddings import VisionEmbeddings

__all__ = [
    "AudioPatchEmbed",
    "MultiheadAttention",
    "PatchEmbed",
    "PatchEmbedWithSize",
    "TubeletEmbed",
    "VisionEmbeddings",
]
