"""Which keys of a DeepSpeed JSON megalm knows, and why it refuses some. Imports neither torch nor deepspeed."""

from __future__ import annotations

# fmt: off
# DeepSpeed 0.19.8, runtime/zero/config.py; a test holds these equal to the installed package's.
ZERO_KEYS = frozenset({
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients",
    "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint",
    "enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "legacy_stage1",
    "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear",
    "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
})
NOT_GATED = "no layout with it is held to the one-process reference"
# What is refused, and why.
REFUSED = {
    "cpu_offload": NOT_GATED,
    "cpu_offload_param": NOT_GATED,
    "leaf_module": NOT_GATED,
    "legacy_stage1": "DeepSpeed 0.19.8 has it no more and would stop",
    "offload_param": NOT_GATED,
    "parameter_alignment": NOT_GATED,
    "stage3_module_granularity_threshold": NOT_GATED,
    "zenflow": "ZenFlow keeps gradients back over several updates, in buffers of its own that no checkpoint holds, and "
    "updates by Adams of its own: neither would the recipe's optimizer be computed nor a run resume",
    "zero_quantized_gradients": "DeepSpeed's kernel reads any gradient as fp16, and those of bf16 and fp32 weights are "
    "fp32: between nodes it would read other numbers",
    "zero_quantized_nontrainable_weights": NOT_GATED,
}
# Flags of stages 1 and 2 that must not be false where ranks divide the experts, and why.
NEEDED_BY_EXPERTS = {
    "contiguous_gradients": "without it experts' gradients are summed as if all data ranks held the same; take it out",
    "reduce_scatter": "without it gradients are summed over all data ranks, which hold different experts; take it out",
}
FLAGS = frozenset({
    "allgather_partitions", "compute_grad_norm", "contiguous_gradients", "cpu_offload_use_pin_memory",
    "elastic_checkpoint", "enable_sanity_checks", "ignore_unused_parameters", "legacy_stage1",
    "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear", "overlap_comm",
    "override_module_apply", "pipeline_loading_checkpoint", "reduce_scatter", "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "stage3_use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zero_quantized_weights",
})
COUNTS = frozenset({
    "allgather_bucket_size", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
    "sub_group_size", "zero_hpz_partition_size",
})
OFFLOAD_KEYS = frozenset({"device", "pin_memory"})
REFUSED_OFFLOAD = {
    "super_offload": "SuperOffload keeps the optimizer's state in a process of its own, where no checkpoint reaches it",
}
NVME = (
    "DeepSpeed moves what is offloaded there into files and leaves empty tensors, from which neither the gradient norm "
    "nor a checkpoint can be taken"
)
LOW_MEMORY_BF16 = frozenset({"bf16_master_weights_and_grads", "bf16_optimizer_states"})
PASSED_ON = frozenset({"comms_logger", "disable_python_gc", "log_level", "zero_optimization"})
# What DeepSpeed would do in an engine that it drives itself: why that is not so here, and what is instead.
IDLE = {
    "disable_allgather": ("DeepSpeed 0.19.8 reads it and does nothing with it", "take it out"),
    "dump_state": ("what it prints goes to a log that megalm keeps quiet", "use megalm config show"),
    "flops_profiler": (
        "it counts torch's functions on rank 0, so neither fused kernels nor other pipeline stages",
        "take it out; metrics.jsonl has FLOP/s and MFU, profile.start=STEP traces the time of each kernel",
    ),
    "memory_breakdown": (
        "it knows nothing of the backward pass, which DeepSpeed does not run, and collects garbage each time",
        "use profile.memory_at=STEP",
    ),
    "wall_clock_breakdown": (
        "it gives 0.00 ms for the backward pass and its reduction, which DeepSpeed does not run",
        "take it out; metrics.jsonl has time/compute_s and time/communication_s, profile.start=STEP traces all phases",
    ),
}
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
# comms_logger's keys beside "enabled" and "debug", as they must be if they are there.
CALL_LOG = {
    "prof_all": (True, "the table has every call"),
    "prof_ops": ([], "the table has every call"),
    "verbose": (False, "a line for each call would drown the run's own; the table at its end has every call"),
}
CHECKED = frozenset({
    "about", "amp", "bf16", "bfloat16", "communication_data_type", "data_types", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "steps_per_print", "train_batch_size",
    "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
})
# fmt: on
