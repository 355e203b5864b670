from tbcm_kernels.adaln.functional import adaln, adaln_jvp

__all__ = ["adaln", "adaln_jvp"]
