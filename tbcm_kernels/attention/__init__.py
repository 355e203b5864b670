from tbcm_kernels.attention.functional import attention, attention_jvp, merge_attention

__all__ = ["attention", "attention_jvp", "merge_attention"]
