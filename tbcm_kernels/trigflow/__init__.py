from tbcm_kernels.trigflow.functional import (
    flow_input,
    flow_input_jvp,
    flow_output,
    flow_output_jvp,
    trajectory_step,
)

__all__ = ["flow_input", "flow_input_jvp", "flow_output", "flow_output_jvp", "trajectory_step"]
