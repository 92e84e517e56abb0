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
    "bf16|64|early_pass"
    "e4m3|64|fp8"
    "e4m3|128|fp8"
    "e4m3|256|fp8"
    "int8|64|fp8"
    "int8|128|fp8"
    "int8|256|fp8"
    "e4m3|64|fp8_fma"
    "e4m3|64|fp8_overlap"
    "e4m3|128|fp8_in_order"
    "e4m3|64|fp8_no_ping_pong"
    "e4m3|128|fp8_no_ping_pong"
    "e4m3|256|fp8_no_ping_pong"
    "bf16|128|cluster"
    "bf16|256|cluster"
    "bf16|64|pdl"
    "bf16|128|pdl"
    "bf16|64|tma_store"
    "bf16|128|tma_store"
    "bf16|128|q_registers"
    "bf16|128|q_registers_6"
    "bf16|128|cluster_q_registers"
    "bf16|128|cluster_wide"
    "bf16|64|pdl_tma_store"
    "bf16|128|pdl_tma_store")

# Quantisation, by input type; with -DHOPPER_FA_EXPERIMENTS=ON only, until they have run on a GPU.
set(HOPPER_FA_QUANTIZE_EXPERIMENT_INSTANCES "bf16" "fp16" "e4m3")
