# The one list of what gets compiled: one translation unit each. dtype | head dim | variant (row of common/tile_table.h)
set(HOPPER_FA_FORWARD_INSTANCES
    "bf16|64|default"
    "bf16|128|default"
    "bf16|256|default"
    "fp16|64|default"
    "fp16|128|default"
    "fp16|256|default")

# Built only with -DHOPPER_FA_EXPERIMENTS=ON.
set(HOPPER_FA_FORWARD_EXPERIMENT_INSTANCES
    "bf16|128|no_warp_specialisation"
    "bf16|128|no_ping_pong"
    "bf16|128|no_overlap"
    "bf16|128|one_q_stage"
    "bf16|128|wide"
    "bf16|256|wide"
    "bf16|64|eager_rescale"
    "bf16|128|eager_rescale"
    "bf16|64|fma_exp2"
    "bf16|64|early_pass")

# Quantisation, by input type; with -DHOPPER_FA_EXPERIMENTS=ON only, until they have run on a GPU.
set(HOPPER_FA_QUANTIZE_EXPERIMENT_INSTANCES "bf16" "fp16" "e4m3")
