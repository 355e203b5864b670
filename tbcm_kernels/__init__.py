"""Value and tangent together: fused Jacobian-vector-product kernels for diffusion transformers.

Each op comes twice: `op(...)` is a drop-in that is correct under `torch.func.jvp`, autograd and
`torch.compile`; `op_jvp(...)` takes and returns explicit tangents. `fuse(model)` puts them into a
model, and `tbcm_kernels.modules` has the layers to build one from. Importing this package starts no
CUDA context and compiles nothing.
"""

from tbcm_kernels._dispatch import implementations
from tbcm_kernels._dual import stop_tangent_gradient
from tbcm_kernels.adaln import adaln, adaln_jvp
from tbcm_kernels.attention import attention, attention_jvp, merge_attention
from tbcm_kernels.conv_glu import conv_glu, conv_glu_jvp
from tbcm_kernels.fuse import Fused, fuse
from tbcm_kernels.linear import linear, linear_jvp
from tbcm_kernels.linear_attention import linear_attention, linear_attention_jvp
from tbcm_kernels.processors import JVPAttnProcessor, JVPJointAttnProcessor
from tbcm_kernels.rms_norm import rms_norm, rms_norm_jvp

__all__ = [
    "Fused",
    "JVPAttnProcessor",
    "JVPJointAttnProcessor",
    "adaln",
    "adaln_jvp",
    "attention",
    "attention_jvp",
    "conv_glu",
    "conv_glu_jvp",
    "fuse",
    "implementations",
    "linear",
    "linear_attention",
    "linear_attention_jvp",
    "linear_jvp",
    "merge_attention",
    "rms_norm",
    "rms_norm_jvp",
    "stop_tangent_gradient",
]
__version__ = "0.1.0"
