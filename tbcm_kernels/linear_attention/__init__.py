from tbcm_kernels.linear_attention.functional import linear_attention, linear_attention_jvp

__all__ = ["linear_attention", "linear_attention_jvp"]
