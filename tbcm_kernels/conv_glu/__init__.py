from tbcm_kernels.conv_glu.functional import conv_glu, conv_glu_jvp

__all__ = ["conv_glu", "conv_glu_jvp"]
