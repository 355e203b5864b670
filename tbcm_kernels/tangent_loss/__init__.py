from tbcm_kernels.tangent_loss.functional import tangent_loss

__all__ = ["tangent_loss"]
