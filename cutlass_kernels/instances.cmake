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
    "e4m3|64|fp8"
    "e4m3|128|fp8"
    "e4m3|256|fp8"
    "int8|64|fp8"
    "int8|128|fp8"
    "int8|256|fp8"
    "e4m3|128|fp8_parts"
    "e4m3|256|fp8_two_q"
    "bf16|64|pdl_tma_store")

# Quantisation, by input type; with -DHOPPER_FA_EXPERIMENTS=ON only, until they have run on a GPU.
set(HOPPER_FA_QUANTIZE_EXPERIMENT_INSTANCES "bf16" "fp16" "e4m3")
