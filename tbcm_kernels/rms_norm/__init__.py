from tbcm_kernels.rms_norm.functional import rms_norm, rms_norm_jvp

__all__ = ["rms_norm", "rms_norm_jvp"]
