from tbcm_kernels.linear.functional import linear, linear_jvp

__all__ = ["linear", "linear_jvp"]
